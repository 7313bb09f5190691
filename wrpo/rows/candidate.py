"""One row of the candidates, checked, and the answer that it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .errors import DataError, shown
from .messages import Asked, asked, text_of
from .numbers import LARGEST_NUMBER, is_bounded

# What servers say of a text that ended before the model had ended it: at a limit, by a filter, or in a fault.
CUT_REASONS = frozenset(
    "length max_tokens max_length max_output_tokens model_length token_limit limit error_limit content_filter "
    "content_filtered guardrail_intervened safety recitation prohibited_content blocklist spii refusal error_toxic "
    "incomplete pause_turn abort aborted cancelled user_cancel error".split()
)
# And of one that the model, or a text to stop at, has ended.
ENDED_REASONS = frozenset(
    "stop stopped stop_sequence stop_token eos eos_token eos_token_id end_turn end_of_turn end complete completed "
    "finish finished word tool_call tool_calls tool_use function_call".split()
)


class Answer(NamedTuple):
    """Ordered from best to worst: by reward, then by model, sample number and text."""

    cost: float  # minus the reward
    model: str
    sample: int
    response: str
    cut: bool
    file: str
    row: int

    @property
    def reward(self) -> float:
        return -self.cost


def is_cut(finish_reason: str | None) -> bool:
    """Whether an answer that ended so is only the beginning of one; None: nobody said how it ended."""
    return finish_reason is not None and finish_reason.lower() in CUT_REASONS


def is_known_reason(finish_reason: str | None) -> bool:
    """Whether it is known what a reason means; None says nothing that could be misread."""
    return finish_reason is None or finish_reason.lower() in CUT_REASONS | ENDED_REASONS


def scorer_of(row: dict) -> str | None:
    """Who gave a row its reward, as `wrpo score` names it; None: the row does not say.

    Raises:
        DataError: with the field, without file and row.
    """
    return _text_or_none(row, "scorer", "Write who gave the reward, or leave it out.")


def checked_candidate(row: dict) -> tuple[Asked, float, str, int, str, bool]:
    """(what was asked, minus the reward, model, sample, response, whether it is cut) of a raw row.

    A row without `sample` has number 0. The response may be empty: a model can say nothing, and that is no fault of
    the row.

    Raises:
        DataError: with the field, without file and row.
    """
    model, response = text_of(row, "model"), text_of(row, "response", may_be_empty=True)
    finish_reason = _text_or_none(row, "finish_reason", "Write how the answer ended, or leave it out.")
    reward, sample = _reward(row.get("reward")), _sample(row.get("sample", 0))
    return asked(row), -reward, model, sample, response, is_cut(finish_reason)


def _reward(value: Any) -> float:
    if not is_bounded(value):
        expected = f"a finite number, at most {LARGEST_NUMBER:g} in size"
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


def _text_or_none(row: dict, name: str, todo: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError("text", shown(value), todo, field=name)
    return value
