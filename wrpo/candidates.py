"""Triples from scored candidate answers.

A candidate is one model's answer to one prompt with a reward model's or judge's score:

    {"prompt_id": str, "prompt": str or messages, "model": str, "sample": int, "response": str, "reward": float}

For each prompt, with the target's answers under the model name `target`,

    source_chosen   the best answer of any source model (or of each of the `num_sources` best models)
    target_chosen   the target's answer with the highest reward
    rejected        the target's answer with the lowest reward

and the prompt is dropped, and counted, where the rewards are too close to prefer anything. Equal rewards are settled by
model name and sample number, so the same candidates give the same triples in any order of the rows. Only the answers
that can still win are held in memory: a file of any length needs a few answers a prompt.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data.errors import BadRows, DataError, shown
from .data.reading import read_rows
from .data.triple import prompt_messages

_TEXT = ("prompt_id", "model", "response")


@dataclass(order=True, frozen=True)
class _Answer:
    """Ordered from best to worst: by reward, then by model and sample number."""

    cost: float  # minus the reward
    model: str
    sample: int
    response: str

    @property
    def reward(self) -> float:
        return -self.cost


@dataclass
class _Prompt:
    """The answers to one prompt that can still win."""

    prompt: Any
    sources: dict[str, _Answer] = field(default_factory=dict)  # model -> its best answer, of the best models only
    best: _Answer | None = None
    worst: _Answer | None = None

    def add(self, answer: _Answer, target: str, num_sources: int) -> None:
        if answer.model == target:
            self.best = answer if self.best is None else min(self.best, answer)
            self.worst = answer if self.worst is None else max(self.worst, answer)
        elif answer < self.sources.get(answer.model, _NO_ANSWER):
            self.sources[answer.model] = answer
            if len(self.sources) > num_sources:
                del self.sources[max(self.sources.values()).model]


_NO_ANSWER = _Answer(math.inf, "", 0, "")


@dataclass
class CandidateReport:
    """What became of the candidates; `str()` of it is the report."""

    candidates: int
    prompts: int
    triples: int
    dropped: Counter[str]
    won: Counter[str]
    bad_rows: str

    def __str__(self) -> str:
        lines = [f"{self.candidates} candidates for {self.prompts} prompts -> {self.triples} triples; {self.bad_rows}"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.most_common()]
        total = self.won.total()
        lines += [f"  {count / total:6.1%}  {model}" for model, count in sorted(self.won.items(), key=_by_count)]
        return "\n".join(lines)


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def make_triples(
    candidates: Any,
    *,
    target: str = "target",
    num_sources: int = 1,
    weight_temperature: float | None = None,
    min_target_gap: float = 0.0,
    min_source_gap: float | None = None,
    skip_bad_rows: bool = False,
) -> tuple[list[dict], CandidateReport]:
    """Explicit triples in the order in which their prompts first appear, and the report.

    Args:
        candidates: path or list of paths (`.jsonl`, `.jsonl.gz`, ...), a `datasets.Dataset`, or a list of dicts.
        target: the model name of the target's own answers.
        num_sources: how many source models a triple keeps, the best answer of each, best first; fewer where a prompt
            has fewer. Default: 1, the paper's.
        weight_temperature: source weights are softmax(reward / weight_temperature), in units of the reward. Default:
            None, equal weights.
        min_target_gap: least reward(target_chosen) - reward(rejected); 0 or less is always dropped. Default: 0.
        min_source_gap: least reward(source_chosen) - reward(rejected), for every source kept. Default: None, any.
        skip_bad_rows: leave bad candidates out and count them, instead of raising.

    Raises:
        DataError: the first bad candidate, or not a single triple.  ValueError: an option out of range.
    """
    if num_sources < 1:
        raise ValueError(f"num_sources: expected at least 1, got {num_sources}.")
    if weight_temperature is not None and not weight_temperature > 0:
        raise ValueError(
            f"weight_temperature: expected more than 0, got {weight_temperature}. None gives equal weights."
        )
    bad = BadRows(skip_bad_rows)
    prompts, count = _gather(candidates, bad, target, num_sources)
    report = CandidateReport(count, len(prompts), 0, Counter(), Counter(), bad.report())
    triples = []
    for prompt_id, held in prompts.items():
        reason = _refusal(held, target, min_target_gap, min_source_gap)
        if reason:
            report.dropped[reason] += 1
        else:
            triples.append(_triple(prompt_id, held, weight_temperature))
            report.won[triples[-1]["source_model"][0]] += 1
    report.triples = len(triples)
    if not triples:
        raise DataError("at least one triple", str(report), "Lower the gaps, or check the model names.")
    return triples, report


def write_triples(triples: Iterable[dict], path: str | Path) -> None:
    """One JSON object a line, UTF-8."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(triple, ensure_ascii=False) + "\n" for triple in triples)


def _gather(candidates: Any, bad: BadRows, target: str, num_sources: int) -> tuple[dict[str, _Prompt], int]:
    """prompt_id -> what can still win there, and the number of good candidates."""
    prompts: dict[str, _Prompt] = {}
    count = 0
    for file, number, row in read_rows(candidates):
        try:
            if isinstance(row, DataError):
                raise row
            answer = _checked(row)
            held = prompts.setdefault(row["prompt_id"], _Prompt(row["prompt"]))
            if held.prompt != row["prompt"]:
                todo = "Give different prompts different ids."
                raise DataError(f"the prompt of {row['prompt_id']!r}", shown(row["prompt"]), todo, field="prompt")
            held.add(answer, target, num_sources)
            count += 1
        except DataError as error:
            bad.add(error.at(file, number))
    return prompts, count


def _checked(row: dict) -> _Answer:
    for name in _TEXT:
        if not isinstance(row.get(name), str) or not row[name].strip():
            got = shown(row[name]) if name in row else "no such field"
            raise DataError("text that is not empty", got, "Fill it in, or drop the row.", field=name)
    prompt_messages(row.get("prompt"))
    reward, sample = row.get("reward"), row.get("sample", 0)
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
        raise DataError("a finite number", shown(reward), "Score the answer, or drop the row.", field="reward")
    if isinstance(sample, bool) or not isinstance(sample, int):
        raise DataError("a whole number", shown(sample), "Number a model's answers to one prompt.", field="sample")
    return _Answer(-float(reward), row["model"], sample, row["response"])


def _refusal(held: _Prompt, target: str, min_target_gap: float, min_source_gap: float | None) -> str | None:
    """Why a prompt gives no triple, or None."""
    if not held.sources:
        return "no answer of a source model"
    if held.best is None or held.worst is None:
        return f"no answer of {target!r}"
    gap = held.best.reward - held.worst.reward
    if gap <= 0 or held.best.response == held.worst.response:
        return f"no two answers of {target!r} that differ in reward and text"
    if gap < min_target_gap:
        return f"target gap below {min_target_gap:g}"
    if min_source_gap is not None and max(held.sources.values()).reward - held.worst.reward < min_source_gap:
        return f"source gap below {min_source_gap:g}"
    return None


def _triple(prompt_id: str, held: _Prompt, temperature: float | None) -> dict:
    assert held.best is not None and held.worst is not None  # `_refusal` saw to it
    sources = sorted(held.sources.values())
    return {
        "prompt_id": prompt_id,
        "prompt": held.prompt,
        "source_chosen": [source.response for source in sources],
        "source_model": [source.model for source in sources],
        "source_weight": _weights([source.reward for source in sources], temperature),
        "target_chosen": held.best.response,
        "rejected": held.worst.response,
        "source_reward": [source.reward for source in sources],
        "target_reward": held.best.reward,
        "rejected_reward": held.worst.reward,
    }


def _weights(rewards: list[float], temperature: float | None) -> list[float]:
    """softmax(reward / temperature); `rewards` come best first, so no exponent is positive."""
    shares = [1.0 if temperature is None else math.exp((reward - rewards[0]) / temperature) for reward in rewards]
    return [share / math.fsum(shares) for share in shares]
