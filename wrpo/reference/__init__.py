"""Where log pi_ref comes from: a frozen copy, the model without its adapters, a cache on disk, the sources."""

from __future__ import annotations
