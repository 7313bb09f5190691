"""Every candidate that has no reward yet, scored once, its row appended with `reward` and `scorer`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from wrpo.rows.appending import AppendedRows, KeySet, hash_of
from wrpo.rows.errors import DataError, shown
from wrpo.sampling.tally import Tally

from .candidates import Candidate, Candidates, checked

GIVE_UP_AFTER = 100  # failures without a reward between them that the scorer is at fault for


class Scorer(Protocol):
    """`score` passes each candidate on, once, with its reward or why it has none, in any order."""

    name: str  # what `scorer` says in the rows

    def score(self, candidates: Iterator[Candidate], rewards: Rewards) -> None: ...


def named_with(name: str, *settings: str) -> str:
    """The name of a scorer and, in 8 letters, the settings that its rewards depend on."""
    return f"{name}:{hash_of(settings):016x}"[: len(name) + 9]


class Rewards:
    """Where a scorer's results go; NaN and infinity are refused here.

    Attributes:
        has_any: whether this scorer has ever given a reward, in this run or in the file.
        given_up: nothing more is to be scored.
    """

    def __init__(self, rows: AppendedRows, name: str, tally: Tally, has_any: bool = False):
        self._rows, self._name, self._tally, self.has_any = rows, name, tally, has_any
        self._failed_in_a_row = 0
        self.given_up = False

    def add(self, candidate: Candidate, reward: float) -> None:
        if not math.isfinite(reward):
            self.fail(candidate, f"the reward is {reward}", is_scorers=not self.has_any)
            return
        row = {"prompt_id": candidate.fields["prompt_id"], **candidate.fields, "reward": reward, "scorer": self._name}
        self._rows.append(row)
        self._tally.add(self._name)
        self._failed_in_a_row, self.has_any = 0, True

    def fail(self, candidate: Candidate, reason: str, *, is_scorers: bool) -> None:
        """`is_scorers`: whether the next candidates will fare no better. A continued run meets what one candidate is at
        fault for first, in a row."""
        self._tally.fail(self._name, reason, candidate.place)
        self._failed_in_a_row += is_scorers
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            self.give_up(f"{GIVE_UP_AFTER} answers in a row got no reward")

    def give_up(self, reason: str) -> None:
        self.given_up = True
        self._tally.give_up(self._name, reason)

    def retry(self) -> None:
        self._tally.retry(self._name)


def score(candidates: Candidates, scorer: Scorer, output: str | Path) -> Tally:
    """Score all candidates but those that `output` already holds.

    Raises:
        UserError: an output file that is in use, or holds another scorer's rewards, or no rewards; a full disk.
    """
    with AppendedRows(output) as rows:
        scored = _scored_keys(rows, scorer.name)
        done = sum(candidate.key in scored for candidate in candidates) if len(scored) else 0
        with Tally({scorer.name: len(candidates)}, "answer", {scorer.name: done}) as tally:
            rewards = Rewards(rows, scorer.name, tally, has_any=len(scored) > 0)
            scorer.score(_unscored(candidates, scored, rewards), rewards)
    return tally


def _unscored(candidates: Candidates, scored: KeySet, rewards: Rewards) -> Iterator[Candidate]:
    for candidate in candidates:
        if rewards.given_up:
            return
        if candidate.key not in scored:
            yield candidate


def _scored_keys(rows: AppendedRows, name: str) -> KeySet:
    scored = KeySet()
    for number, row in rows:
        try:
            if "reward" not in row:
                todo = "Name another output file; this one is not of `wrpo score`."
                raise DataError("a scored answer", "no reward", todo, field="reward")
            if row.get("scorer") != name:
                todo = (
                    "One file holds one scorer's rewards, with one template, scale and label; name another output file."
                )
                raise DataError(f"rewards of {name!r}, as now", shown(row.get("scorer")), todo, field="scorer")
            scored.add(Candidate(checked(row), "").key)
        except DataError as error:
            raise error.at(str(rows.path), number) from None
    return scored
