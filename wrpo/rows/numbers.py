"""Numbers that a row may hold: of any kind that JSON and Parquet have, but finite, and far from where sums overflow."""

from __future__ import annotations

from typing import Any

LARGEST_NUMBER = 1e30  # sums, gaps and softmax stay finite, in float32 too


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_bounded(value: Any) -> bool:
    """Whether it is a number of at most that size. Compared, not converted: an integer may be too large for a float.
    NaN fails the comparison.
    """
    return is_number(value) and -LARGEST_NUMBER <= value <= LARGEST_NUMBER
