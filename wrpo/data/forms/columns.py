"""What the other columns of a row say of its responses: shares, models, rewards, log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from wrpo.data.roles import REJECTED, ROLES, SOURCE, TARGET
from wrpo.rows.candidate import is_cut
from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import utf8
from wrpo.rows.numbers import LARGEST_NUMBER, is_bounded, is_number

from .response import Response

SHARE_TOLERANCE = 1e-4  # what ten shares written with five decimals can miss 1 by
LARGEST_LOGP = 1e-3  # what rounding can make of log 1

_OMIT = "or leave the field out."


def numbers(value: Any, count: int, field: str, may_be_none: bool = False) -> list:
    values = _listed(value, count)
    known = [number for number in values if not (may_be_none and number is None)]
    if len(values) != count or not all(map(is_bounded, known)):
        todo = f"Give one number for each response, at most {LARGEST_NUMBER:g} in size, {_OMIT}"
        raise DataError(f"{count} finite number{'s' * (count > 1)}", shown(value), todo, field=field)
    return [None if number is None else float(number) for number in values]


def names(value: Any, count: int, field: str) -> list[str | None]:
    values = _listed(value, count)
    if len(values) != count or not all(name is None or isinstance(name, str) for name in values):
        todo = f"Give one name for each response, {_OMIT}"
        raise DataError(f"{count} name{'s' * (count > 1)}", shown(value), todo, field=field)
    return [None if name is None else utf8(name, field) for name in values]


def shares(value: Any, count: int, field: str) -> list[float]:
    """Numbers >= 0 that sum to 1 exactly; 1 / count each where there is no value."""
    if value is None:
        return [1.0 / count] * count
    values = _listed(value, count)
    if len(values) != count or not all(map(is_number, values)):
        todo = "Give one number for each response, or leave the field out for equal shares."
        raise DataError(f"{count} number{'s' * (count > 1)}", shown(value), todo, field=field)
    total = math.fsum(values) if all(map(is_bounded, values)) else math.inf
    if not (all(share >= 0 for share in values) and abs(total - 1) <= SHARE_TOLERANCE):
        todo = "Divide each by their sum."
        raise DataError("shares >= 0 that sum to 1", f"{shown(value)}, sum {total:g}", todo, field=field)
    return [share / total for share in values]


def sequence_logp(value: Any, count: int, field: str) -> list[float | None]:
    """Log-probs of whole responses, nats; None: not known."""
    logp = numbers(value, count, field, may_be_none=True)
    if not all(number is None or number <= LARGEST_LOGP for number in logp):
        raise DataError("log-probs, at most 0", shown(value), "Give the sum over the response's tokens.", field=field)
    return logp


def logp_by_model(value: Any, count: int, field: str) -> list[list[float] | None]:
    """For each response its mean log-prob a token under each of M models, nats; None: not known."""
    of_all = value if isinstance(value, list) else []
    rows = [row for row in of_all if row is not None]
    lengths = {len(row) if isinstance(row, list) else 0 for row in rows}
    if len(of_all) != count or len(lengths) != 1 or 0 in lengths:
        todo = f"Give one list for each response, in the order of the row, {_OMIT}"
        raise DataError(f"{count} lists with one number for each model", shown(value), todo, field=field)
    if not all(is_bounded(logp) and logp <= LARGEST_LOGP for row in rows for logp in row):
        todo = "Divide the sum over the response's tokens by their number."
        raise DataError("finite mean log-probs, at most 0", shown(value), todo, field=field)
    return [None if row is None else [float(logp) for logp in row] for row in of_all]


def truth_values(value: Any, count: int, field: str) -> list[bool]:
    values = _listed(value, count)
    if len(values) != count or not all(isinstance(part, bool) for part in values):
        todo = f"Give one for each response, in the order of the row, {_OMIT}"
        raise DataError(f"{count} truth value{'s' * (count > 1)}", shown(value), todo, field=field)
    return values


def cut_by_reason(value: Any, count: int, field: str) -> list[bool | None]:
    """Whether each response is cut, by the reason why it ended; one reason for several says nothing of any of them."""
    reasons = [value] if isinstance(value, str) else value
    if isinstance(value, str) and count > 1 and not is_cut(value):
        return [None] * count
    is_text = isinstance(reasons, list) and all(reason is None or isinstance(reason, str) for reason in reasons)
    if not is_text or len(reasons) != count:
        todo = f"Give one for each response, in the order of the row, {_OMIT}"
        raise DataError(f"{count} reason{'s' * (count > 1)}", shown(value), todo, field=field)
    return [None if reason is None else is_cut(reason) for reason in reasons]


def _listed(value: Any, count: int) -> list:
    return value if isinstance(value, list) else [value] * (count if value is None else 1)


def _numbers_or_none(value: Any, count: int, field: str) -> list:
    return numbers(value, count, field, may_be_none=True)


# Column, the roles of the responses that it speaks of, what it says of them, and how it is read.
Columns = tuple[tuple[str, tuple[str, ...], str, Callable[[Any, int, str], list]], ...]
_CHOSEN = (SOURCE, TARGET)
COLUMNS: Columns = (
    ("source_weight", (SOURCE,), "share", shares),
    ("rejected_weight", (REJECTED,), "share", shares),
    ("source_model", (SOURCE,), "model", names),
    ("rejected_model", (REJECTED,), "model", names),
    ("score_chosen", _CHOSEN, "reward", numbers),
    ("score_rejected", (REJECTED,), "reward", numbers),
    ("source_reward", (SOURCE,), "reward", numbers),
    ("target_reward", (TARGET,), "reward", numbers),
    ("rejected_reward", (REJECTED,), "reward", numbers),
    ("ref_chosen_logps", _CHOSEN, "ref_logp", sequence_logp),
    ("ref_rejected_logps", (REJECTED,), "ref_logp", sequence_logp),
    ("ref_logp", ROLES, "ref_logp", sequence_logp),
    ("source_logp", ROLES, "source_logp", logp_by_model),
    ("finish_reason", ROLES, "cut", cut_by_reason),
    ("cut", ROLES, "cut", truth_values),
)
OF_EXAMPLES: Columns = (
    ("share", ROLES, "share", numbers),
    ("model", ROLES, "model", names),
    ("reward", ROLES, "reward", _numbers_or_none),
)


def with_columns(row: dict, responses: list[Response], columns: Columns = COLUMNS) -> list[Response]:
    """The responses with what the row's columns say of them; a column lists those of its roles in the row's order.

    Raises:
        DataError: a column that cannot be read, or that says something else than another one.
    """
    told = list(responses)
    by: dict[tuple[int, str], str] = {}
    for column, roles, what, read in columns:
        if row.get(column) is None:
            continue
        places = [k for k, response in enumerate(responses) if response.role in roles]
        for k, value in zip(places, read(row[column], len(places), column) if places else [], strict=True):
            there = getattr(told[k], what)
            if None not in (there, value) and not _is_same(there, value):
                earlier = by.get((k, what), "the row's scores, shares or names")
                expected = f"{shown(there)} for {told[k].field}, as in {earlier}"
                raise DataError(expected, shown(value), "Leave one of the two out.", field=column)
            if value is not None:
                told[k], by[k, what] = told[k]._replace(**{what: value}), column
    return told


def _is_same(one: Any, other: Any) -> bool:
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one == other


def with_shares(responses: list[Response]) -> list[Response]:
    """The responses with shares that sum to 1 in each role; equal ones where the row gives none."""
    shared = list(responses)
    for role in {response.role for response in responses}:
        places = [k for k, response in enumerate(responses) if response.role == role]
        given = [responses[k].share for k in places]
        for k, share in zip(places, shares(None if None in given else given, len(places), "share"), strict=True):
            shared[k] = shared[k]._replace(share=share)
    return shared
