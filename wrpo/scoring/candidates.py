"""Answers that are to be scored, checked once and then read as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo.rows.candidate import checked_candidate
from wrpo.rows.errors import BadRows, DataError
from wrpo.rows.files import files_once
from wrpo.rows.messages import Asked, Message, asked, message_text, text_of
from wrpo.rows.reading import read_rows
from wrpo.user_error import UserError


@dataclass(frozen=True)
class Candidate:
    """One answer; `fields` is its whole row, `place` where it stands."""

    fields: dict[str, Any]
    place: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Also the response: an answer that was drawn again is scored again."""
        row = self.fields
        return row["prompt_id"], row["model"], row["sample"], row["response"]

    @property
    def asked(self) -> Asked:
        return asked(self.fields)

    @property
    def messages(self) -> list[Message]:
        return self.asked.messages

    @property
    def response(self) -> str:
        return self.fields["response"]


class Candidates:
    """The candidates of some files: `len`, and iterate as often as you like.

    Args:
        paths: files or globs of rows {"prompt_id", "prompt", "model", "sample", "response", ...}; a file named twice
            is read once.
        output: the file that is going to be written; no candidates are read from it.
        in_shard: which prompt ids are scored. Default: all.
        belongs: which rows of which files are read at all. Default: all.
        skip_bad_rows: leave bad rows out and count them, instead of raising.

    Raises:
        DataError: a bad row, or none at all.  UserError: `output` among the files.  FileNotFoundError: no such file.
    """

    def __init__(
        self,
        paths: list[str],
        output: str | Path,
        *,
        in_shard: Callable[[str], bool] = lambda prompt_id: True,
        belongs: Callable[[str, dict], bool] = lambda file, row: True,
        skip_bad_rows: bool = False,
    ):
        self._paths, self._in_shard, self._output = files_once(paths), in_shard, Path(output).resolve()
        self._belongs = belongs
        self.bad = BadRows(skip_bad_rows)
        self._count, rows = 0, 0
        for candidate in self._all():
            rows += 1
            if isinstance(candidate, DataError):
                self.bad.add(candidate)
            else:
                self._count += self._in_shard(candidate.fields["prompt_id"])
        if rows == self.bad.count:
            got = self.bad.report() if rows else "an empty file"
            raise DataError("at least one answer", got, "Check the files.", file=", ".join(paths))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Candidate]:
        for candidate in self._all():
            if isinstance(candidate, Candidate) and self._in_shard(candidate.fields["prompt_id"]):
                yield candidate

    def _all(self) -> Iterator[Candidate | DataError]:
        last = None
        for file, number, row in read_rows(self._paths):
            if file != last:
                self._refuse_output(file)
                last = file
            try:
                if isinstance(row, DataError):
                    raise row
                if not self._belongs(file, row):
                    continue
                yield Candidate(checked(row), f"{file}, row {number}")
            except DataError as error:
                yield error.at(file, number)

    def _refuse_output(self, file: str) -> None:
        if Path(file).resolve() == self._output:
            raise UserError(f"{file}: is read and written at once; name another output file, or fewer to read")


def checked(row: dict) -> dict:
    """The row with a `sample`, 0 where it has none; what `wrpo build` would refuse is refused here.

    Raises:
        DataError: with the field, without file and row.
    """
    text_of(row, "prompt_id")
    _, _, _, sample, _, _ = checked_candidate(row | {"reward": 0})
    return row | {"sample": sample}


def prompt_text(question: Asked) -> str:
    """One user message of nothing but text is that; a conversation names its speakers, and the tools come first."""
    if isinstance(question.prompt, str) and not question.tools:
        return question.prompt
    tools = [f"tools: {json.dumps(question.tools, ensure_ascii=False)}"] if question.tools else []
    return "\n\n".join([*tools, *(f"{message['role']}: {message_text(message)}" for message in question.messages)])
