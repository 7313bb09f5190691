"""Triples as one `datasets.Dataset` in the explicit form, every row checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features, Value

from wrpo.rows.errors import BadRows, DataError
from wrpo.rows.reading import read_rows

from .triple import normalise

logger = logging.getLogger("wrpo.data")

ROWS_PER_TABLE = 1000  # rows held as Python objects at a time; the rest is Arrow, as large as its text

_SOURCES = {
    "prompt": [{"role": Value("string"), "content": Value("string")}],
    "source_chosen": [Value("string")],
    "source_weight": [Value("float64")],
    "source_model": [Value("string")],
    "source_reward": [Value("float64")],
}
_TARGETS = {
    "target_chosen": Value("string"),
    "rejected": Value("string"),
    "source_logp": [[Value("float64")]],
}
_PLACE = {"file": Value("string"), "row": Value("int64")}


def load_triples(
    source: Any, *, split: str = "train", skip_bad_rows: bool = False, targets: bool = True
) -> datasets.Dataset:
    """Read, check and normalise triples; the form of a row is described in `wrpo.data.triple`.

    Args:
        source: path, glob or list of paths (`.jsonl`, `.json`, either with `.gz`, `.parquet`, or a folder of
            `save_to_disk`), a `datasets.Dataset`, or a list of dicts.
        split: the split of a saved `DatasetDict`. Default: "train".
        skip_bad_rows: leave bad rows out and count them in the report, instead of raising. Default: False.
        targets: False for the SFT stage, which needs the source answers only. Default: True.

    Returns:
        Dataset with the explicit row's columns, those of the target's responses only if `targets`, and where each row
        came from (`file`, `row`). In memory, as Arrow.

    Raises:
        DataError: the first bad row, a source without a single good one, or one that cannot be read.
        FileNotFoundError: no such path.  TypeError: a source of an unknown type.
    """
    features = Features(_SOURCES | (_TARGETS if targets else {}) | _PLACE)
    bad = BadRows(skip_bad_rows)
    tables, rows = [], []
    name = str(source) if isinstance(source, (str, Path)) else "triples"
    for file, number, raw in read_rows(source, split=split):
        try:
            if isinstance(raw, DataError):
                raise raw
            rows.append(normalise(raw, targets=targets) | {"file": file, "row": number})
        except DataError as error:
            bad.add(error.at(file, number))
        if len(rows) == ROWS_PER_TABLE:
            tables.append(pa.Table.from_pylist(rows, schema=features.arrow_schema))
            rows = []
    tables.append(pa.Table.from_pylist(rows, schema=features.arrow_schema))
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise DataError("at least one triple", f"no rows and {bad.report()}", "Check the file.", file=name)
    logger.log(logging.WARNING if bad.count else logging.INFO, "%s: %d rows loaded, %s", name, len(table), bad.report())
    return datasets.Dataset(table)
