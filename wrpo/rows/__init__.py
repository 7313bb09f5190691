"""Rows on disk, each command's first and last step: reading, appending, candidates, shards, locks."""

from __future__ import annotations
