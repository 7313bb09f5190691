"""A batch that fails is halved until single rows fail alone: too little memory, or one row that is at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from wrpo.user_error import in_one_line

Item = TypeVar("Item")
Result = TypeVar("Result")


class RowFault(str):
    """Why one row has no result, where that says nothing about the next row."""


def halving(batch: list[Item], compute: Callable[[list[Item]], list[Result]]) -> Iterator[tuple[Item, Result | str]]:
    """Every item with its result, or with the reason why there is none.

    `compute` gives one result an item. A RuntimeError (torch's, also of memory), ValueError or IndexError halves the
    batch; anything else is raised. A reason is a `RowFault`, unless it is an error of torch's other than memory.
    """
    try:
        results = compute(batch)
    except (RuntimeError, ValueError, IndexError) as error:
        is_torchs = isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError"
        reason = in_one_line(error) if is_torchs else RowFault(in_one_line(error))
    else:
        yield from zip(batch, results, strict=True)
        return
    if len(batch) == 1:
        yield batch[0], reason
        return
    middle = len(batch) // 2
    yield from halving(batch[:middle], compute)
    yield from halving(batch[middle:], compute)
