"""Rows of answers, checked: what `wrpo sample` writes, with the reward that `wrpo score` adds where it is there.

    {"prompt_id": str, "prompt": str or messages, "model": str, "sample": int, "response": str, "reward": float, ...}

A row without a reward is an answer that nobody has scored yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo.rows.candidate import checked_candidate, scorer_of
from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Asked, Message, text_of
from wrpo.rows.reading import read_rows

from .comparison import Scores

_KNOWN = ("prompt_id", "prompt", "model", "sample", "response", "reward")


@dataclass(frozen=True)
class Answer:
    """One model's answer; `fields` holds whatever else the row says (a skill, a category)."""

    prompt_id: str
    asked: Asked
    model: str
    sample: int
    response: str
    reward: float | None
    fields: dict[str, Any]

    @property
    def prompt(self) -> str | list[Message]:
        return self.asked.prompt


def read_answers(
    paths: Sequence[str | Path], belongs: Callable[[str, dict], bool] = lambda file, row: True
) -> list[Answer]:
    """Every answer of the files, in order, without the rows that `belongs(file, row)` leaves out.

    Raises:
        DataError: a row that is none, two answers under one model, prompt and sample number, two prompts under one id,
            rewards of two scorers for one prompt, or no answer at all.
    """
    prompts: dict[str, Asked] = {}
    answers: dict[tuple[str, str, int], Answer] = {}
    scorers: dict[str, str | None] = {}  # prompt id -> who gave the rewards
    for file, number, row in read_rows(list(paths)):
        try:
            if isinstance(row, DataError):
                raise row
            if not belongs(file, row):
                continue
            answer = _checked(row)
            key = (answer.model, answer.prompt_id, answer.sample)
            if key in answers:
                got = f"a second sample {answer.sample} of {answer.model!r} for {answer.prompt_id!r}"
                raise DataError("one answer a model, prompt and sample", got, "Number the samples.", field="sample")
            if prompts.setdefault(answer.prompt_id, answer.asked) != answer.asked:
                todo = "Give different prompts different ids."
                raise DataError(f"the prompt of {answer.prompt_id!r}", shown(answer.prompt), todo, field="prompt")
            if answer.reward is not None and scorers.setdefault(answer.prompt_id, scorer_of(row)) != scorer_of(row):
                todo = "Rewards of two scorers are no one scale: score all answers with one, here or by `wrpo score`."
                expected = f"rewards of one scorer, {shown(scorers[answer.prompt_id])}, for {answer.prompt_id!r}"
                raise DataError(expected, shown(scorer_of(row)), todo, field="scorer")
            answers[key] = answer
        except DataError as error:
            raise error.at(file, number) from None
    if not answers:
        raise DataError("at least one answer", "none", "Check the files.", file=", ".join(map(str, paths)))
    return list(answers.values())


def _checked(row: dict) -> Answer:
    prompt_id = text_of(row, "prompt_id")
    is_scored = row.get("reward") is not None
    asked, cost, model, sample, response, _ = checked_candidate(row if is_scored else row | {"reward": 0})
    others = {name: value for name, value in row.items() if name not in _KNOWN}
    return Answer(prompt_id, asked, model, sample, response, -cost if is_scored else None, others)


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
