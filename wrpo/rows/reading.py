"""Raw rows from files and data sets, each with its file and row number.

JSON lines are read here line by line, so that one broken line is an error of that line; Parquet and saved data sets are
read through pyarrow and `datasets`, without the null fields of their objects: a table has one wherever another row has
the field. A row that cannot be read is yielded as a `DataError` in the row's place: whether it stops the load is
decided by the caller.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import DataError, shown
from .json_lines import unique_fields

# A second of imports, and files of JSON do without.
if TYPE_CHECKING:
    import datasets

RawRow = tuple[str, int, "dict | DataError"]  # file, row counted from 1, content

BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")


def read_rows(source: Any, *, split: str = "train") -> Iterator[RawRow]:
    """Every row of `source` in order.

    Args:
        source: a path or glob (JSON lines, a JSON array, either gzipped, Parquet, or a folder written by
            `save_to_disk`), a list of such paths, a `datasets.Dataset`, or a list of dicts. Files of a glob are read in
            the order of their names.
        split: which split of a saved `DatasetDict` is read.

    Raises:
        FileNotFoundError: no such path.  DataError, TypeError: a source that cannot be read at all.
    """
    if isinstance(source, (str, Path)):
        return _read_path(Path(source), split)
    if (loaded := sys.modules.get("datasets")) is not None:  # without it there is no data set to be given
        if isinstance(source, loaded.Dataset):
            return _read_dataset("dataset", source)
        if isinstance(source, loaded.DatasetDict):
            return _read_dataset(f"dataset[{split!r}]", _pick_split(source, split))
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(part, (str, Path)) for part in source):
            return chain.from_iterable(_read_path(Path(part), split) for part in source)
        return _numbered("rows", source)
    raise TypeError(
        f"source: expected a path, a list of paths or of dicts, or a datasets.Dataset, got {type(source).__name__}. "
        "Load a streaming data set into a datasets.Dataset first."
    )


def _read_path(path: Path, split: str) -> Iterator[RawRow]:
    named = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not named:
        return _read_found(path, split)
    return chain.from_iterable(_read_found(Path(part), split) for part in named)


def _read_found(path: Path, split: str) -> Iterator[RawRow]:
    """One file or folder; a glob can name one that is not there, a symbolic link to nowhere."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            todo = f"Name the files in it, for example '{path}/*.jsonl'."
            raise DataError("a folder of save_to_disk", "another folder", todo, file=str(path))
        import datasets

        saved = datasets.load_from_disk(str(path))
        saved = _pick_split(saved, split) if isinstance(saved, datasets.DatasetDict) else saved
        return _read_dataset(str(path), saved)
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith(SUFFIXES):
        return _read_json(path)
    expected = f"a folder or a file ending in one of {', '.join(SUFFIXES)}"
    raise DataError(expected, repr(path.name), "Rename or convert it.", file=str(path))


def _pick_split(saved: datasets.DatasetDict, split: str) -> datasets.Dataset:
    if split not in saved:
        raise DataError(f"a split out of {sorted(saved)}", repr(split), "Name one of them.", field="split")
    return saved[split]


def _numbered(file: str, rows: Iterable) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield file, number, _as_object(row).at(file, number) if not isinstance(row, dict) else row


def _as_object(row: object) -> DataError:
    return DataError("an object with named fields", shown(row), "Write one JSON object per row.")


# -- JSON -------------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_json(path: Path) -> Iterator[RawRow]:
    """A file that starts with `[` is one array; anything else is JSON lines, whatever its suffix."""
    with _opened(path) as file:
        try:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        except BROKEN_GZIP as error:
            raise _broken_gzip(path, error) from error
    return _read_json_array(path) if start.startswith(b"[") else _read_json_lines(path)


def _read_json_array(path: Path) -> Iterator[RawRow]:
    rows = _parse(b"".join(_lines(path)))
    if isinstance(rows, DataError):
        raise rows.at(str(path), None)
    yield from _numbered(str(path), rows)


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    name = str(path)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if not isinstance(row, (dict, DataError)):
            row = _as_object(row)
        yield name, number, row.at(name, number) if isinstance(row, DataError) else row


def _lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        try:
            yield from file
        except BROKEN_GZIP as error:
            raise _broken_gzip(path, error) from error


def _broken_gzip(path: Path, error: Exception) -> DataError:
    return DataError("a whole gzip file", str(error), "Copy or compress it again.", file=str(path))


def _parse(raw: bytes) -> Any:
    """The JSON value, or the error that says why there is none."""
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=unique_fields)
    except UnicodeDecodeError as error:
        return DataError(
            "UTF-8 text", f"byte {raw[error.start]:#04x} at byte {error.start + 1}", "Save the file as UTF-8."
        )
    except json.JSONDecodeError as error:
        got = f"{error.msg} at line {error.lineno} column {error.colno} of {shown(raw.decode())}"
        return DataError("valid JSON", got, "Repair the row.")
    except DataError as error:
        return error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets in brackets
        return DataError("JSON that Python can read", f"{error} in {shown(raw.decode())}", "Repair the row.")


# -- Arrow ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[RawRow]:
    number = 0
    for batch in _parquet_batches(path):
        try:
            rows: list = batch.to_pylist()
        except (ValueError, OverflowError):  # one row is at fault; the others are good
            rows = [_row_or_error(lambda: batch.slice(k, 1).to_pylist()[0]) for k in range(batch.num_rows)]  # noqa: B023
        for row in rows:
            number += 1
            yield str(path), number, _of_table(row, str(path), number)


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        twice = [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]
        if twice:
            raise DataError("each column once", f"several {twice[0]!r}", "Rename or drop one.", file=str(path))
        yield from file.iter_batches(batch_size=256)
    except DataError:
        raise
    except Exception as error:  # of broken bytes pyarrow raises what it likes
        got = " ".join(str(error).split())
        raise DataError("a Parquet file that is whole", got, "Copy or write it again.", file=str(path)) from error


def _read_dataset(name: str, dataset: datasets.Dataset) -> Iterator[RawRow]:
    plain = dataset.with_format(None)
    for number in range(1, len(plain) + 1):
        yield name, number, _of_table(_row_or_error(lambda: plain[number - 1]), name, number)  # noqa: B023


def _of_table(row: dict | DataError, file: str, number: int) -> dict | DataError:
    if isinstance(row, DataError):
        return row.at(file, number)
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _row_or_error(fetch: Callable[[], dict]) -> dict | DataError:
    """Arrow checks its text only when it is read, and has dates that Python has not."""
    try:
        return fetch()
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x}"
        return DataError("UTF-8 text", got, "Write the column as UTF-8.")
    except (ValueError, OverflowError) as error:
        got = " ".join(str(error).split())
        return DataError("values that Python can hold", got, "Write dates and times as text, or leave the column out.")
