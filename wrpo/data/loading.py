"""Examples as one `datasets.Dataset`, every row read from whatever form it has, and checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features, Value

from wrpo.rows.errors import BadRows, DataError
from wrpo.rows.messages import json_text
from wrpo.rows.reading import read_rows

from .example import example_of
from .forms.response import is_several_messages

logger = logging.getLogger("wrpo.data")

SEVERAL = (
    "%s: in %d rows chosen or rejected is a list of the assistant's messages alone: each is read as an answer, of the "
    "chosen the last as the target's, the others as sources'. Where they are one answer, join their texts"
)
ROWS_PER_TABLE = 1000  # rows held as Python objects at a time; the rest is Arrow, as large as its text

# Messages, tools and options are JSON text: rows have different fields, and Arrow would make nulls of those that are
# not there.
FEATURES = Features(
    {
        "prompt": Value("string"),
        "responses": [Value("string")],
        "role": [Value("string")],
        "share": [Value("float64")],
        "model": [Value("string")],
        "reward": [Value("float64")],
        "ref_logp": [Value("float64")],
        "source_logp": [[Value("float64")]],
        "cut": [Value("bool")],
        "tools": Value("string"),
        "chat_template_kwargs": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),
    }
)


def load_examples(
    source: Any,
    *,
    split: str = "train",
    skip_bad_rows: bool = False,
    stage: str = "preference",
    from_scores: bool = False,
) -> datasets.Dataset:
    """Read and check rows of preference or fine-tuning data; `wrpo.data.forms` says in which forms.

    Args:
        source: path, glob or list of paths (`.jsonl`, `.json`, either with `.gz`, `.parquet`, or a folder of
            `save_to_disk`), a `datasets.Dataset` (`load_hub` gives one), or a list of dicts. Rows of all forms may be
            mixed.
        split: the split of a saved `DatasetDict`. Default: "train".
        skip_bad_rows: leave bad rows out and count them in the report, instead of raising. Default: False.
        stage: "preference", or "sft" for the best answer of each row alone. Default: "preference".
        from_scores: of rows that score all their answers, all of them instead of the best and the worst. Default:
            False.

    Returns:
        Dataset with the fields of `wrpo.data.example.example_of`, where `prompt` is the JSON text of the messages,
        `responses` that of each message, `tools` and `chat_template_kwargs` JSON text or null; and where each row came
        from (`file`, `row`). In memory, as Arrow.

    Raises:
        DataError: the first bad row, a source without a single good one, or one that cannot be read.
        FileNotFoundError: no such path.  TypeError: a source of an unknown type.
    """
    schema = FEATURES.arrow_schema
    bad, several = BadRows(skip_bad_rows), 0
    tables, rows = [], []
    name = str(source) if isinstance(source, (str, Path)) else "rows"
    for file, number, raw in read_rows(source, split=split):
        try:
            if isinstance(raw, DataError):
                raise raw
            example = example_of(raw, stage=stage, from_scores=from_scores)
            rows.append(_as_text(example) | {"file": file, "row": number})
            several += any(is_several_messages(raw.get(name)) for name in ("chosen", "rejected"))
        except DataError as error:
            bad.add(error.at(file, number))
        if len(rows) == ROWS_PER_TABLE:
            tables.append(pa.Table.from_pylist(rows, schema=schema))
            rows = []
    tables.append(pa.Table.from_pylist(rows, schema=schema))
    table = pa.concat_tables(tables)
    if not table.num_rows:
        got = f"no rows and {bad.report()}" if bad.count else "none"
        raise DataError("at least one row", got, "Check the file.", file=name)
    logger.log(logging.WARNING if bad.count else logging.INFO, "%s: %d rows loaded, %s", name, len(table), bad.report())
    if several:
        logger.warning(SEVERAL, name, several)
    return datasets.Dataset(table)


def load_hub(name: str, config: str | None = None, split: str = "train") -> datasets.Dataset:
    """The raw rows of a data set on the Hugging Face hub, or in a folder in the layout of one.

    Args:
        name: its name there, e.g. "org/name", or the folder.
        config: which of its configurations. Default: None, the only or the default one.
        split: which split, or a part of it, e.g. "train[:10%]". Default: "train".

    Raises:
        DataError: no such data set, configuration or split, or no way to the hub.
    """
    try:
        return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        got = " ".join(f"{error} {error.__cause__ or ''}".split()).rstrip(".") or type(error).__name__
        expected = f"a data set with the split {split!r}" + (f" and the configuration {config!r}" if config else "")
        raise DataError(expected, got, "Check its name, configuration and split.", file=name) from error


def _as_text(example: dict[str, Any]) -> dict[str, Any]:
    texts = {
        name: json_text(example[name], name) for name in ("prompt", "tools", "chat_template_kwargs") if example[name]
    }
    responses = [json_text(response, "responses") for response in example["responses"]]
    empty: dict[str, Any] = {"tools": None, "chat_template_kwargs": None}
    return example | empty | texts | {"responses": responses}
