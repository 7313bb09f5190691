"""How long tokenised rows are, and their largest token id; of a `datasets.Dataset` without making Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from wrpo.rows.errors import DataError

ROWS_AT_A_TIME = 1000
COLUMNS = ["prompt_ids", "response_ids", "role"]


def lengths_of(rows: Any) -> Iterator[tuple[int, list[int], list[str]]]:
    """Of each row: tokens of its prompt, tokens of each response, and the responses' roles."""
    if not hasattr(rows, "select_columns"):
        for row in _whole(rows):
            yield len(row["prompt_ids"]), [len(ids) for ids in row["response_ids"]], row["role"]
        return
    import pyarrow.compute as pc

    for number, table in enumerate(tables(rows, COLUMNS)):
        for name in COLUMNS:
            if table[name].null_count:
                place = number * ROWS_AT_A_TIME + table[name].is_null().to_pylist().index(True)
                raise _lacking(name, place + 1, rows.column_names)
        prompts = pc.list_value_length(table["prompt_ids"]).to_pylist()
        lengths = iter(pc.list_value_length(pc.list_flatten(table["response_ids"])).to_pylist())
        for prompt, roles in zip(prompts, table["role"].to_pylist(), strict=True):
            yield prompt, [next(lengths) for _ in roles], roles


def _whole(rows: Any) -> Iterator[dict]:
    """Raises DataError for a row that lacks a column."""
    for number, row in enumerate((rows[index] for index in range(len(rows))), 1):
        if lacking := next((name for name in COLUMNS if row.get(name) is None), None):
            raise _lacking(lacking, number, row)
        yield row


def _lacking(name: str, number: int, columns: Iterable[str]) -> DataError:
    todo = "Make the rows with wrpo.data.tokenize_examples."
    return DataError("a value", f"none beside {', '.join(map(str, columns))}", todo, field=name, row=number)


def longest_sequences(rows: Any) -> list[int]:
    """Of each row, the tokens of its prompt and its longest response."""
    return [prompt + max(responses, default=0) for prompt, responses, _ in lengths_of(rows)]


def tokens_with_prompt_once(rows: Any) -> list[int]:
    """Of each row, the tokens of its prompt and of all its responses, as a shared row holds them."""
    return [prompt + sum(responses) for prompt, responses, _ in lengths_of(rows)]


def largest_id(rows: Any) -> int:
    """-1 where there is no token."""
    if not hasattr(rows, "select_columns"):
        sequences = (ids for row in _whole(rows) for ids in (row["prompt_ids"], *row["response_ids"]))
        return max((max(ids, default=-1) for ids in sequences), default=-1)
    import pyarrow.compute as pc

    largest = -1
    for table in tables(rows, ["prompt_ids", "response_ids"]):
        for column, depth in (("prompt_ids", 1), ("response_ids", 2)):
            ids = table[column]
            for _ in range(depth):
                ids = pc.list_flatten(ids)
            largest = max(largest, pc.max(ids).as_py() if len(ids) else -1)
    return largest


def tables(rows: Any, columns: list[str]) -> Iterator[Any]:
    return rows.select_columns(columns).with_format("arrow").iter(ROWS_AT_A_TIME)
