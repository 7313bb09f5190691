"""How far a measured share or difference may be from the true one: intervals over the prompts that were drawn.

A share is the mean over prompts of values in [0, 1]: 0 or 1 (solved or not, won or lost), or between them where a tie
counts half or a prompt has several answers. Among such values of mean p the coin's have the largest variance, p(1 - p);
so Wilson's interval, with one trial a prompt, fits the coin and is on the wide side for all others. A difference of
scores has no bounds; there the paired bootstrap draws the prompts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
FEWEST = 10  # prompts that a bootstrap interval needs
RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 draws each


class Interval(NamedTuple):
    low: float
    high: float


def wilson_interval(share: float, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The p with |share - p| <= z sqrt(p (1 - p) / trials), z the normal quantile of `confidence`, two-sided.

    Args:
        share: mean of `trials` independent values in [0, 1].
        trials: how many; with none the interval is [0, 1].

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if trials == 0:
        return Interval(0.0, 1.0)
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = (z2 * (share * (1 - share) + z2 / 4)) ** 0.5 / (1 + z2)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Interval | None:
    """Percentile interval of the mean of `values`, one a prompt, each drawn again `RESAMPLES` times with replacement.

    Given the differences of two models on the same prompts it is the paired bootstrap. Of fewer than `FEWEST` prompts
    there is none: it would be too narrow, and of one prompt a point. The same `seed` gives the same interval.

    Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(values) < FEWEST:
        return None
    drawn = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [drawn[generator.integers(len(drawn), size=len(drawn))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
