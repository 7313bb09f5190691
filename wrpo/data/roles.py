"""The three roles of a response, and which answer of a row is its best.

source     an answer of a source model, preferred
target     an answer of the model that is trained, preferred; the `chosen` of a plain pair
rejected   an answer that the preferred ones are to beat
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

ROLES = (SOURCE, TARGET, REJECTED) = ("source", "target", "rejected")  # the order of a row's responses


class Role(IntEnum):
    """A role as a batch of tensors holds it."""

    SOURCE = 0
    TARGET = 1
    REJECTED = 2


# What a tokenised row says of each of its responses, where it says it.
OF_RESPONSES = ("response_ids", "role", "share", "model", "reward", "ref_logp", "source_logp")


def best_response(role: Sequence[str], share: Sequence[float]) -> int:
    """The place of the answer that SFT learns: the source's of largest share, without one the target's."""
    order = {name: number for number, name in enumerate(ROLES)}
    return min(range(len(role)), key=lambda place: (order[role[place]], -share[place]))


def model_names(row: dict[str, Any]) -> list[str | None]:
    """The name of the model behind each response: `source 1`, `source 2`, .. for sources that have none; else None."""
    names, number = [], 0
    for role, name in zip(row["role"], row.get("model") or [None] * len(row["role"]), strict=True):
        number += role == SOURCE
        names.append((name or f"source {number}") if role == SOURCE else None)
    return names


def without(row: dict[str, Any], role: str) -> dict[str, Any]:
    """The row without its responses of one role, if others of its preferred ones remain."""
    preferred = {name for name in row["role"] if name != REJECTED}
    if role not in preferred or len(preferred) == 1:
        return row
    kept = [place for place, name in enumerate(row["role"]) if name != role]
    lists = {name: [row[name][place] for place in kept] for name in OF_RESPONSES if row.get(name) is not None}
    return {**row, **lists}
