"""What tokenised rows hold, in one hash: another row, another order or another weight gives another one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_128

from .lengths import tables

COLUMNS = ("prompt_ids", "response_ids", "role", "share", "model", "reward", "ref_logp", "source_logp")


def data_fingerprint(rows: Any) -> str | None:
    """The number of rows and a hash of all that is trained on; None of a stream, which can be gone through once.

    Of a `datasets.Dataset` without making Python objects of its ids: 6,000 rows of 1,000 tokens take 0.03 s, and
    1.6 s as a list (Zen 3, 2026-11-30).
    """
    if not hasattr(rows, "__len__"):
        return None
    digest = xxh3_128()
    for piece in _of_table(rows) if hasattr(rows, "select_columns") else _of_rows(rows):
        digest.update(piece)
    return f"{len(rows):,} rows, {digest.hexdigest()[:16]}"


def _of_rows(rows: Any) -> Iterator[bytes]:
    for row in (rows[index] for index in range(len(rows))):
        yield json.dumps([row.get(name) for name in COLUMNS], default=lambda array: array.tolist()).encode()


def _of_table(rows: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = [name for name in COLUMNS if name in rows.column_names]
    for table in tables(rows, names):
        for name in names:
            column = table[name]
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                yield json.dumps(pc.list_value_length(column).to_pylist()).encode()
                column = pc.list_flatten(column)
            is_id = pa.types.is_integer(column.type) and not column.null_count
            yield column.cast(pa.int64()).to_numpy() if is_id else json.dumps(column.to_pylist()).encode()
