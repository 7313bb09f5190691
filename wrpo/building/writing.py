"""Rows into JSON lines or Parquet, files that are whole or not there.

Everything is written in a folder `unfinished` inside the output folder and moved out of it at the end, report.json
last: where that stands, the set is complete. A run that is stopped removes its folder; one that is killed leaves it,
and the next run of the same shard clears it. `unfinished.lock` beside it keeps a second run out.

    sft.jsonl  triples.jsonl  prompts.jsonl  report.json  rewards.png
    triples-00003.jsonl                      the fourth file, with `rows_per_file`
    triples-00001-of-00004.jsonl             the second shard of four; with both, triples-00001-of-00004-00003.jsonl
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from wrpo.rows.errors import DataError, shown
from wrpo.rows.json_lines import json_line
from wrpo.rows.lock import held
from wrpo.rows.messages import Message, json_text, prompt_messages
from wrpo.rows.shards import Shard
from wrpo.user_error import UserError

ROWS_PER_GROUP = 1000  # of Parquet, held as Python objects until written
OURS = re.compile(
    r"(?:sft|triples|prompts|report|rewards)(?:-(\d{5})-of-(\d{5}))?(?:-\d{5})?\.(?:jsonl|parquet|json|png)"
)

# Tool calls, tools and options of the chat template are JSON text: their fields differ from row to row.
_OF_MESSAGES = ("role", "content", "reasoning_content", "name", "tool_call_id", "tool_calls")
_MESSAGES = pa.list_(pa.struct([(name, pa.string()) for name in _OF_MESSAGES]))
_PROMPT = [
    ("prompt_id", pa.string()),
    ("prompt", _MESSAGES),
    ("tools", pa.string()),
    ("chat_template_kwargs", pa.string()),
]
_SFT = [
    *_PROMPT,
    ("source_chosen", pa.list_(pa.string())),
    ("source_model", pa.list_(pa.string())),
    ("source_weight", pa.list_(pa.float64())),
    ("source_reward", pa.list_(pa.float64())),
    ("cut", pa.list_(pa.bool_())),
]
_TRIPLE = [
    *_SFT,
    ("target_chosen", pa.string()),
    ("rejected", pa.string()),
    ("target_reward", pa.float64()),
    ("rejected_reward", pa.float64()),
    ("rejected_model", pa.string()),
]
SCHEMAS = {"prompts": pa.schema(_PROMPT), "sft": pa.schema(_SFT), "triples": pa.schema(_TRIPLE)}


class Output:
    """A set of files, complete when the `with` block ends without an error, and gone when it ends with one.

    Args:
        folder: made if it is not there.
        format: "jsonl" or "parquet".
        rows_per_file: begin another file after so many rows; None: one file a kind.
        shard: which shard the names speak of.
        overwrite: replace what an earlier build left in `folder`; without it that is an error.

    Raises:
        UserError: files of an earlier build, or another build under way.  OSError: a folder that cannot be written.
    """

    def __init__(self, folder: Path, format: str, rows_per_file: int | None, shard: Shard, overwrite: bool):
        self.folder, self._overwrite, self._shard = folder, overwrite, shard
        self._format, self._rows_per_file = format, rows_per_file
        self.tag = f"-{shard.index:05d}-of-{shard.count:05d}" if shard.count > 1 else ""
        self.unfinished = folder / f"unfinished{self.tag}"
        self._held = ExitStack()
        self._unfinished_files: dict[str, _RowFile] = {}
        self._files: dict[str, int] = {}  # kind -> files begun

    def __enter__(self) -> Output:
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f"output_dir: another build is writing {self.folder}. Wait for it, or name another folder."
        with ExitStack() as held_so_far:
            held_so_far.enter_context(held(self.folder / f"{self.unfinished.name}.lock", busy))
            self._refuse_earlier()
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir()
            self._held = held_so_far.pop_all()
        return self

    def write(self, kind: str, row: dict[str, Any]) -> None:
        file = self._unfinished_files.get(kind)
        if file is not None and file.rows == self._rows_per_file:
            file.close()
            file = None
        if file is None:
            file = self._unfinished_files[kind] = self._begin(kind)
        file.write(row)
        file.rows += 1

    def path(self, name: str) -> Path:
        """Where to write a file that is not made of rows, e.g. report.json; it moves with the others."""
        stem, suffix = name.split(".")
        return self.unfinished / f"{stem}{self.tag}.{suffix}"

    def files(self) -> dict[str, Path]:
        """Kind -> its file, or the glob of its files, ready for `train_file`."""
        part = "" if self._rows_per_file is None else "-*"
        return {kind: self.folder / f"{kind}{self.tag}{part}.{self._format}" for kind in sorted(self._files)} | {
            name: path for name in ("report", "rewards") for path in self.folder.glob(f"{name}{self.tag}.*")
        }

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            while self._unfinished_files:
                self._unfinished_files.popitem()[1].close()
            if kind is None:
                self._publish()
        finally:
            with self._held:
                shutil.rmtree(self.unfinished, ignore_errors=True)

    def _begin(self, kind: str) -> _RowFile:
        number = self._files.get(kind, 0)
        self._files[kind] = number + 1
        part = "" if self._rows_per_file is None else f"-{number:05d}"
        path = self.unfinished / f"{kind}{self.tag}{part}.{self._format}"
        return _Parquet(path, SCHEMAS[kind]) if self._format == "parquet" else _JsonLines(path)

    def _publish(self) -> None:
        """The report goes first and comes last, so that a kill leaves none beside an incomplete set."""
        self._refuse_earlier()  # another shard's, or the whole's, may have come in the meantime
        for old in sorted(self._earlier(), key=_is_report, reverse=True):
            old.unlink()
        for path in sorted(self.unfinished.iterdir(), key=_is_report):
            path.replace(self.folder / path.name)

    def _refuse_earlier(self) -> None:
        earlier = self._earlier()
        if earlier and not self._overwrite:
            raise UserError(
                f"output_dir: {self.folder} holds {earlier[0].name} of an earlier build. Name another folder, or "
                "replace it with --overwrite."
            )

    def _earlier(self) -> list[Path]:
        """Files of a build, without those of the other shards of this one."""
        found = [(path, OURS.fullmatch(path.name)) for path in sorted(self.folder.iterdir())]
        return [path for path, match in found if match and not self._is_sibling(match)]

    def _is_sibling(self, match: re.Match) -> bool:
        return match[2] is not None and int(match[2]) == self._shard.count and int(match[1]) != self._shard.index


def _is_report(path: Path) -> bool:
    return path.name.startswith("report")


class _RowFile(Protocol):
    rows: int

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path):
        self.rows = 0
        self._file = path.open("wb")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json_line(row))

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema):
        self.rows = 0
        self._file = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema)
        self._schema, self._held = schema, []  # type: pa.Schema, list[dict]

    def write(self, row: dict[str, Any]) -> None:
        beside = {name: json_text(row[name], name) for name in ("tools", "chat_template_kwargs") if name in row}
        self._held.append(
            row | {"prompt": [_for_table(message) for message in prompt_messages(row["prompt"])]} | beside
        )
        if len(self._held) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        with self._file:
            self._flush()
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_pylist(self._held, schema=self._schema))
            self._held = []


def _for_table(message: Message) -> Message:
    """The message with its tool calls as JSON text.

    Raises:
        DataError: a field for which the table has no column.
    """
    calls = {"tool_calls": json_text(message["tool_calls"], "tool_calls")} if "tool_calls" in message else {}
    message = message | calls
    for name, value in message.items():
        if name not in _OF_MESSAGES or not isinstance(value, (str, type(None))):
            todo = "Write the rows with format jsonl, or leave the field out."
            raise DataError(f"text under {', '.join(_OF_MESSAGES)}", f"{name}: {shown(value)}", todo, field="prompt")
    return message
