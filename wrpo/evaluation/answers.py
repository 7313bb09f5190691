"""Rows of answers, checked: what `wrpo sample` writes, with the reward that `wrpo score` adds where it is there.

    {"prompt_id": str, "prompt": str or messages, "model": str, "sample": int, "response": str, "reward": float, ...}

Unlike a candidate for training, an answer may be empty: a model that says nothing is worth what the scorer gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo.data.errors import DataError, shown
from wrpo.data.reading import read_rows
from wrpo.data.triple import Message, prompt_messages

from .comparison import Scores

_KNOWN = ("prompt_id", "prompt", "model", "sample", "response", "reward")


@dataclass(frozen=True)
class Answer:
    """One model's answer; `fields` holds whatever else the row says (a skill, a category)."""

    prompt_id: str
    prompt: Any
    model: str
    sample: int
    response: str
    reward: float | None
    fields: dict[str, Any]

    @property
    def messages(self) -> list[Message]:
        return prompt_messages(self.prompt)


def read_answers(paths: list[str | Path]) -> list[Answer]:
    """Every answer of the files, in order.

    Raises:
        DataError: a row that is none, two answers under one model, prompt and sample number, or no answer at all.
    """
    answers: dict[tuple[str, str, int], Answer] = {}
    for file, number, row in read_rows(list(paths)):
        try:
            if isinstance(row, DataError):
                raise row
            answer = _checked(row)
            key = (answer.model, answer.prompt_id, answer.sample)
            if key in answers:
                got = f"a second sample {answer.sample} of {answer.model!r} for {answer.prompt_id!r}"
                raise DataError("one answer a model, prompt and sample", got, "Number the samples.", field="sample")
            answers[key] = answer
        except DataError as error:
            raise error.at(file, number) from None
    if not answers:
        raise DataError("at least one answer", "none", "Check the files.", file=", ".join(map(str, paths)))
    return list(answers.values())


def _checked(row: dict) -> Answer:
    for name in ("prompt_id", "model"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError("text that is not empty", shown(row.get(name)), "Fill it in.", field=name)
    if not isinstance(row.get("response"), str):
        raise DataError("text", shown(row.get("response")), "'' says nothing.", field="response")
    prompt_messages(row.get("prompt"))
    sample, reward = row.get("sample", 0), row.get("reward")
    if isinstance(sample, bool) or not isinstance(sample, int):
        raise DataError("a whole number", shown(sample), "Number a model's answers to one prompt.", field="sample")
    if reward is not None and (isinstance(reward, bool) or not _is_finite(reward)):
        raise DataError("a finite number", shown(reward), "Score the answer again.", field="reward")
    others = {name: value for name, value in row.items() if name not in _KNOWN}
    return Answer(row["prompt_id"], row["prompt"], row["model"], sample, row["response"], reward, others)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def scores_of(answers: Iterable[Answer]) -> Scores:
    """The rewards by model and prompt.

    Raises:
        DataError: an answer without a reward.
    """
    scores: Scores = {}
    for answer in answers:
        if answer.reward is None:
            todo = "Run `wrpo score` on the answers, or name a scorer here."
            got = f"none for {answer.model!r} on {answer.prompt_id!r}"
            raise DataError("a reward", got, todo, field="reward")
        scores.setdefault(answer.model, {}).setdefault(answer.prompt_id, []).append(float(answer.reward))
    return scores


def groups_of(answers: Iterable[Answer], field: str) -> dict[str, str]:
    """prompt_id -> what the rows say under `field`.

    Raises:
        DataError: a prompt whose rows say nothing, or two things, under it.
    """
    groups: dict[str, str] = {}
    for answer in answers:
        value = answer.fields.get(field)
        if value is None:
            got = f"none for {answer.prompt_id!r}, beside {sorted(answer.fields)}"
            raise DataError("a value", got, "Name a field of the rows to group by.", field=field)
        if groups.setdefault(answer.prompt_id, str(value)) != str(value):
            todo = "A prompt belongs to one group."
            raise DataError(f"{groups[answer.prompt_id]!r} as before", shown(value), todo, field=field)
    return groups
