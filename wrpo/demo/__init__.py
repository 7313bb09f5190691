"""WRPO seen at work: `python -m wrpo.demo` teaches a small chat model to do exactly what was asked."""

from __future__ import annotations
