"""One row of the candidates, checked, and the answer that it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .errors import DataError, shown
from .messages import Asked, asked, utf8

LARGEST_REWARD = 1e30  # sums, gaps and softmax stay finite far below the limits of float64


class Answer(NamedTuple):
    """Ordered from best to worst: by reward, then by model, sample number and text."""

    cost: float  # minus the reward
    model: str
    sample: int
    response: str
    file: str
    row: int

    @property
    def reward(self) -> float:
        return -self.cost


def checked_candidate(row: dict) -> tuple[Asked, float, str, int, str]:
    """(what was asked, minus the reward, model, sample, response) of a raw row.

    A row without `sample` has number 0. The response may be empty: a model can say nothing, and that is no fault of
    the row.

    Raises:
        DataError: with the field, without file and row.
    """
    model, response = checked_text(row, "model"), checked_text(row, "response", may_be_empty=True)
    return asked(row), -_reward(row.get("reward")), model, _sample(row.get("sample", 0)), response


def checked_text(row: dict, name: str, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (may_be_empty or (value and not value.isspace())):
        expected = "text" if may_be_empty else "text that is not empty"
        got = shown(value) if name in row else "no such field"
        raise DataError(expected, got, "Fill it in, or drop the row.", field=name)
    return utf8(value, name)


def _reward(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may be too large for a float, so it is compared before it is converted; NaN fails the comparison.
    if not is_number or not -LARGEST_REWARD <= value <= LARGEST_REWARD:
        expected = f"a finite number, at most {LARGEST_REWARD:g} in size"
        raise DataError(expected, shown(value), "Score the answer, or drop the row.", field="reward")
    return float(value)


def _sample(value: Any) -> int:
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)  # a column of whole numbers that passed through pandas
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise DataError(
            "a whole number from 0", shown(value), "Number a model's answers to one prompt.", field="sample"
        )
    return value
