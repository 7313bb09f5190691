"""Rows without the responses that a run would only multiply by zero."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import datasets
from torch.utils.data import Dataset, IterableDataset

from .roles import without

logger = logging.getLogger("wrpo.data")


def leave_out(rows: Any, role: str | None) -> Any:
    """Tokenised rows without their responses of `role` where others are preferred; None leaves all as they are.

    Args:
        rows: a list, a `datasets.Dataset`, anything with length and index, or a stream; None stays None.
        role: "source" or "target".
    """
    if role is None or rows is None:
        return rows
    if hasattr(rows, "__len__"):
        is_table = isinstance(rows, datasets.Dataset)
        roles = rows["role"] if is_table else (rows[index].get("role", ()) for index in range(len(rows)))
        if not any(role in own for own in roles):
            return rows
    logger.info("Left out: the %ss of rows that have other preferred answers, as they weigh nothing in this run", role)
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(without, fn_kwargs={"role": role})
    # torch's streams have a `__getitem__` that only raises.
    return RowsWithout(rows, role) if hasattr(rows, "__len__") else StreamWithout(rows, role)


class RowsWithout(Dataset):
    def __init__(self, rows: Any, role: str):
        self.rows, self.role = rows, role

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return without(self.rows[index], self.role)


class StreamWithout(IterableDataset):
    def __init__(self, rows: Any, role: str):
        self.rows, self.role = rows, role

    def __iter__(self) -> Iterator[dict]:
        return (without(row, self.role) for row in self.rows)
