"""What models are asked: prompts, checked once, and the requests made of them.

A prompt is a row

    {"prompt_id": str, "prompt": str or messages, "system": str, "tools": list, "chat_template_kwargs": mapping, ...}

of which the prompt alone must be there. Without a `prompt_id` its id is a hash of the prompt. Prompts are read from
their files each time, never held: one costs about 100 bytes here, however long it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from wrpo.rows.appending import hash_of
from wrpo.rows.errors import BadRows, DataError, shown
from wrpo.rows.files import files_once
from wrpo.rows.messages import Asked, asked
from wrpo.rows.reading import read_rows


@dataclass(frozen=True)
class Prompt:
    """One prompt; `fields` holds what of its row goes into the rows of its answers."""

    prompt_id: str
    asked: Asked
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: number `sample` of `model` to a prompt."""

    prompt: Prompt
    model: str
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.prompt.prompt_id, self.model, self.sample

    @property
    def place(self) -> str:
        """For messages."""
        return f"sample {self.sample} of prompt {self.prompt.prompt_id}"

    def seed(self, run_seed: int, unusable: int = 0) -> int:
        """31 bits fixed by the run's seed and the request; another one after each answer that could not be used."""
        return hash_of((run_seed, *self.key, unusable)) >> 33


@dataclass(frozen=True)
class Reply:
    """text; finish_reason: "stop", "length" (cut), or what else a server calls it."""

    text: str
    finish_reason: str | None


class Prompts:
    """The prompts of a shard, each once: `len`, and iterate as often as you like.

    Args:
        paths: files or globs that `wrpo.rows.reading` reads; a file named twice is read once.
        keep: fields of the rows that the answers' rows carry on, e.g. what a verifier compares with.
        in_shard: which prompt ids are asked. Default: all.
        skip_bad_rows: leave bad prompts out and count them, instead of raising.

    Raises:
        DataError: a bad prompt, one id for two prompts, or no prompt at all.  FileNotFoundError: no such file.
    """

    def __init__(
        self,
        paths: list[str],
        *,
        keep: tuple[str, ...] = (),
        in_shard: Callable[[str], bool] = lambda prompt_id: True,
        skip_bad_rows: bool = False,
    ):
        self._paths, self._keep, self._in_shard = files_once(paths), keep, in_shard
        self.bad = BadRows(skip_bad_rows)
        self._left_out: set[tuple[str, int]] = set()  # bad, and repeated
        self._contents: dict[int, int] = {}  # hash of the id -> hash of the prompt
        self.repeated = 0
        self._count = self._check()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prompt]:
        for file, number, row in read_rows(self._paths):
            if (file, number) not in self._left_out and isinstance(row, dict):
                prompt = self._prompt_of(row)
                if self._in_shard(prompt.prompt_id):
                    yield prompt

    def refuse_changed(self, answer: dict) -> None:
        """Raises DataError where an answer's row asks something else than the files hold under its id."""
        content = _content_hash(asked(answer))
        if self._contents.get(hash_of((answer["prompt_id"],)), content) != content:
            todo = "Give the changed prompt another id, or name another output file."
            expected = f"the prompt that is now {answer['prompt_id']!r}"
            raise DataError(expected, shown(answer["prompt"]), todo, field="prompt")

    def _check(self) -> int:
        """How many there are; what is to be left out is noted on the way."""
        rows = 0
        for file, number, row in read_rows(self._paths):
            rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                prompt = self._prompt_of(row)
                if self._in_shard(prompt.prompt_id):
                    self._register(prompt, (file, number))
            except DataError as error:
                self._left_out.add((file, number))
                self.bad.add(error.at(file, number))
        if rows == self.bad.count:
            got = self.bad.report() if rows else "an empty file"
            raise DataError("at least one prompt", got, "Check the files.", file=", ".join(map(str, self._paths)))
        return len(self._contents)

    def _register(self, prompt: Prompt, where: tuple[str, int]) -> None:
        identity, content = hash_of((prompt.prompt_id,)), _content_hash(prompt.asked)
        if identity not in self._contents:
            self._contents[identity] = content
        elif self._contents[identity] == content:
            self.repeated += 1
            self._left_out.add(where)
        else:
            got = f"another prompt under {prompt.prompt_id!r}"
            raise DataError("one prompt an id", got, "Give different prompts different ids.", field="prompt_id")

    def _prompt_of(self, row: dict) -> Prompt:
        question = asked(row)
        missing = [name for name in self._keep if name not in row]
        if missing:
            got = f"fields {sorted(map(str, row))}"
            raise DataError("the field that --keep names", got, "Add it, or name another.", field=missing[0])
        content = {"prompt": question.prompt if row.get("system") else row["prompt"], **question.beside}
        return Prompt(_prompt_id(row, content), question, content | {name: row[name] for name in self._keep})


def _prompt_id(row: dict, content: dict) -> str:
    if row.get("prompt_id") is None:
        hashed = content if len(content) > 1 else content["prompt"]
        return blake2b(_canonical(hashed).encode(), digest_size=8).hexdigest()
    value = row["prompt_id"]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise DataError("printable text", shown(value), "Fill it in, or leave the field out.", field="prompt_id")
    return value


def _content_hash(question: Asked) -> int:
    """The same for all ways to write the same messages."""
    return hash_of((_canonical(question),))


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True)
