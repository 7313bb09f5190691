"""Shares from rewards, without torch: whoever only chooses rows does not wait for it to load."""

from __future__ import annotations

import math


def softmax(values: list[float], temperature: float) -> list[float]:
    """exp(value / temperature) over their sum."""
    largest = max(values)
    powers = [math.exp((value - largest) / temperature) for value in values]
    return [power / math.fsum(powers) for power in powers]
