"""One prompt and its answers, once its rows are found to agree with each other."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from wrpo.rows.candidate import Answer
from wrpo.rows.errors import BadRows, DataError, shown
from wrpo.rows.messages import Asked

from .grouping import Record

REPEATED = "the same row again"


class Prompt(NamedTuple):
    """One prompt and all answers to it, best first."""

    prompt_id: str
    asked: Asked
    answers: list[Answer]

    @property
    def fields(self) -> dict[str, Any]:
        """What each row of it begins with."""
        return {"prompt_id": self.prompt_id, "prompt": self.asked.prompt, **self.asked.beside}


def one_prompt(group: list[Record], bad: BadRows, dropped: Counter[str]) -> Prompt | None:
    """The prompt of records (order, prompt id, what was asked, *fields of `Answer`) that share a prompt id.

    Rows that repeat another are dropped and counted. Rows that contradict another are bad, both sides of them, for
    nothing says which is right: all answers where the prompts differ, and then there is no prompt; the answers of one
    model and sample number where texts or rewards differ.

    Raises:
        DataError: the first contradiction, unless bad rows are skipped.
    """
    _, prompt_id, asked, *_ = group[0]
    answers = sorted(Answer(*record[3:]) for record in group)
    other = next((record for record in group if record[2] != asked), None)
    if other is not None:
        _add_all(_two_prompts(group[0], other), answers, bad)
        return None
    return Prompt(prompt_id, asked, _without_contradictions(prompt_id, answers, bad, dropped))


def _without_contradictions(prompt_id: str, answers: list[Answer], bad: BadRows, dropped: Counter[str]) -> list[Answer]:
    first: dict[tuple[str, int], Answer] = {}
    contradicted: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        key = (answer.model, answer.sample)
        earlier = first.setdefault(key, answer)
        if earlier is answer:
            continue
        if earlier[:5] == answer[:5]:
            dropped[REPEATED] += 1
        else:
            contradicted.setdefault(key, [earlier]).append(answer)
    for rows in contradicted.values():
        _add_all(_two_answers(prompt_id, *rows[:2]), rows, bad)
    return [answer for key, answer in first.items() if key not in contradicted]


def _add_all(error: DataError, rows: list[Answer], bad: BadRows) -> None:
    bad.add(error)
    for _ in rows[1:]:
        bad.note(error.field, str(error))


def _two_prompts(one: Record, other: Record) -> DataError:
    return DataError(
        f"the prompt that {one[1]!r} has in {one[-2]}, row {one[-1]}, {_shown(one)}",
        _shown(other),
        "Give different prompts different ids.",
        field="prompt", file=other[-2], row=other[-1],
    )  # fmt: skip


def _shown(record: Record) -> str:
    beside = record[2].beside
    return shown(record[2].prompt) + (f" with {shown(beside)}" if beside else "")


def _two_answers(prompt_id: str, one: Answer, other: Answer) -> DataError:
    return DataError(
        f"one answer of {one.model!r} with sample {one.sample} to {prompt_id!r}",
        f"another {_difference(one, other)} than in {one.file}, row {one.row}",
        "Number a model's answers to one prompt from 0.",
        field="sample", file=other.file, row=other.row,
    )  # fmt: skip


def _difference(one: Answer, other: Answer) -> str:
    if one.response != other.response:
        return "text"
    return "reward" if one.cost != other.cost else "finish_reason"
