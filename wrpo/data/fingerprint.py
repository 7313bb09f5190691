"""What tokenised rows hold, in one hash: another row, another order or another weight gives another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_128

from .lengths import ROWS_AT_A_TIME, tables

COLUMNS = ("prompt_ids", "response_ids", "role", "share", "model", "reward", "ref_logp", "source_logp")


def data_fingerprint(rows: Any) -> str | None:
    """The number of rows and a hash of all that is trained on; None of a stream, which can be gone through once.

    The same for a list and a `datasets.Dataset` of the same rows. Ids become no Python objects: 6,000 rows of 1,000
    tokens take 0.01 s, and 0.3 s as a list (Zen 3, 2026-11-30).
    """
    if not hasattr(rows, "__len__"):
        return None
    digest = xxh3_128()
    for columns in _of_table(rows) if hasattr(rows, "select_columns") else _of_rows(rows):
        for name, column in columns.items():
            if column.null_count < len(column):  # else it is as good as absent
                digest.update(name.encode())
                for piece in _pieces(column, is_id=name.endswith("_ids")):
                    digest.update(piece)
    return f"{len(rows):,} rows, {digest.hexdigest()[:16]}"


def _of_table(rows: Any) -> Iterator[dict[str, Any]]:
    """The columns of ROWS_AT_A_TIME rows, of pyarrow."""
    names = [name for name in COLUMNS if name in rows.column_names]
    for table in tables(rows, names):
        yield {name: table[name] for name in names}


def _of_rows(rows: Any) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = [rows[index] for index in range(start, min(start + ROWS_AT_A_TIME, len(rows)))]
        yield {name: pa.array([_listed(row.get(name)) for row in part]) for name in COLUMNS}


def _listed(value: Any) -> Any:
    """Arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    is_flat = not isinstance(value, (list, tuple)) or not value or isinstance(value[0], (int, float, str))
    return value if is_flat else [_listed(part) for part in value]


def _pieces(column: Any, is_id: bool) -> Iterator[Any]:
    """The lengths of its lists, level by level, and the values in them: ids as int64, other numbers as float64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        yield json.dumps(pc.list_value_length(column).to_pylist()).encode()
        column = pc.list_flatten(column)
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    column = column.cast(pa.int64() if is_id else pa.float64()) if is_number else column
    yield column.to_numpy() if is_number and not column.null_count else json.dumps(column.to_pylist()).encode()
