"""The fusion coefficient alpha over training: "progressive adaptation".

By the number of steps done,

    alpha(p) = start + (end - start) * rise(min(1, p / warmup_ratio))        p = optimizer steps done / all steps

    rise(x) = x                       "linear", the paper's with start 0 and warmup_ratio 1
            = (1 - cos(pi x)) / 2     "cosine"
            = 1                       "constant": alpha = end throughout

which depends on nothing else, so every micro-batch of one optimizer step sees the same alpha, and a resumed run sees
what the uninterrupted one would have seen. The first step of the paper's schedule has alpha = 0: it is DPO on the
target's own pair.

"adaptive" goes by what has been learned instead: the reward shifts to the source as the policy comes to prefer the
target's better answer to its worse one, and shifts back if it forgets,

    alpha = start + (end - start) * clip((accuracy - 1/2) / (goal - 1/2), 0, 1)

with the target's running accuracy, see `wrpo.training.source_performance`; 1/2 is a coin's.

Source: WRPO, arXiv:2412.03187; the adaptive rule is ours.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor

Schedule = Literal["linear", "cosine", "constant"]  # by the number of steps


def alpha_at(progress: float, *, schedule: str, start: float, end: float, warmup_ratio: float) -> float:
    """alpha after the share `progress` of training.

    Args:
        progress: optimizer steps done / all optimizer steps, in [0, 1]; more counts as 1.
        schedule: "linear", "cosine" or "constant".
        start, end: alpha before the first step and from `warmup_ratio` on, each in [0, 1].
        warmup_ratio: share of training over which alpha rises, in [0, 1]; 0 is `end` from the first step.

    Raises:
        ValueError: the schedule has another name.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule must be one of {list(get_args(Schedule))}, got {schedule!r}")
    if schedule == "constant" or progress >= warmup_ratio:
        return end
    x = progress / warmup_ratio
    rise = x if schedule == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0
    return start + (end - start) * rise


def adaptive_alpha(accuracy: Tensor, *, start: float, end: float, goal: float) -> Tensor:
    """alpha at the target's running accuracy, [] like it, without waiting for the device.

    Args:
        accuracy: [] share of the rows whose target answer has the larger reward than the rejected one.
        start, end: alpha up to an accuracy of 1/2 and from `goal` on, each in [0, 1].
        goal: in (1/2, 1].
    """
    return start + (end - start) * ((accuracy - 0.5) / (goal - 0.5)).clamp(0.0, 1.0)
