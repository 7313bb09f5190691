"""What the arms of all seeds come to: means over seeds, intervals, and differences paired within a seed.

A seed has its own models, prompts and held-out prompts, so it is the unit: an accuracy is one number a seed, and

    mean +- t(n - 1) * s / sqrt(n)        s the standard deviation over the n seeds

is its 95 % interval (Student's t). Two arms are compared by the differences within each seed, in which what a seed's
models and prompts are worth cancels.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .skills import SKILLS

# The 0.975 quantile of Student's t for 1 to 20 degrees of freedom; beyond, the last one, which is on the wide side.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
EVERYTHING = "all"


class Estimate(NamedTuple):
    """mean over seeds, half the width of its 95 % interval (NaN of one seed), number of seeds."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        mean = f"{round(self.mean, 1) + 0.0:.1f}"  # + 0.0: no negative zero
        return mean if self.seeds < 2 else f"{mean} ± {self.half:.1f}"

    @property
    def excludes_zero(self) -> bool:
        return self.seeds > 1 and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], float("nan"), 1)
    quantile = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1]
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / count**0.5, count)


class Results:
    """The records of every seed and arm that is on the disk."""

    def __init__(self, records: Sequence[dict[str, Any]]):
        self.records = {(record["seed"], record["arm"]): record for record in records}

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Every `seed-N/results/ARM.json` below the folder."""
        files = sorted(folder.glob("seed-*/results/*.json"))
        return cls([json.loads(path.read_text(encoding="utf-8")) for path in files])

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for seed, name in self.records if name == arm)

    def accuracy(self, seed: int, arm: str, skill: str = EVERYTHING) -> float:
        """Per cent of the held-out prompts solved; of all skills, their mean."""
        solved = self.records[seed, arm]["solved"]
        shares = {name: 100 * statistics.fmean(solved[name]) for name in SKILLS}
        return statistics.fmean(shares.values()) if skill == EVERYTHING else shares[skill]

    def mean(self, arm: str, skill: str = EVERYTHING) -> Estimate | None:
        """None of an arm that no seed has."""
        values = [self.accuracy(seed, arm, skill) for seed in self.seeds(arm)]
        return estimate(values) if values else None

    def gain(self, arm: str, over: str, skill: str = EVERYTHING) -> Estimate | None:
        """Accuracy of `arm` minus that of `over`, over the seeds that have both."""
        both = sorted(set(self.seeds(arm)) & set(self.seeds(over)))
        values = [self.accuracy(seed, arm, skill) - self.accuracy(seed, over, skill) for seed in both]
        return estimate(values) if values else None
