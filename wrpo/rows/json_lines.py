"""Rows as JSON lines: one row a line, whatever text it holds; and objects whose fields have a name each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import DataError, shown


def json_line(row: dict) -> bytes:
    """UTF-8, with its line end; what JSON does not know (a date from Parquet, say) as text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair in some field: as an escape it stays readable
        return f"{json.dumps(row, default=str)}\n".encode()


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """The whole file or none: it has its name once it is complete. Its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(map(json_line, rows))
    os.replace(partial, path)


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose fields of one name Python would keep the last.

    Raises:
        DataError: a field that stands there twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        values = [value for name, value in pairs if name == twice]
        raise DataError("each field once", " and ".join(map(shown, values)), "Leave one of them out.", field=twice)
    return content
