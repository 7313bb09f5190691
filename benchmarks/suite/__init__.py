"""The machinery of the benchmarks: problems, contestants, timing, tables and pictures."""

from __future__ import annotations
