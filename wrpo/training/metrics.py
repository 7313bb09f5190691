"""What a WRPO run logs, under the names of the paper's code, and its means over steps and ranks.

K sources with shares q_k and B examples; every value is one number an example:

    rewards/source_chosen      sum_k q_k r(source_k)            logps/source_chosen the same of log-probs, nats
    rewards/target_chosen      r(target)                        logps/target_chosen
    rewards/rejected           r(rejected)                      logps/rejected
    rewards/chosen             alpha * source_chosen + (1 - alpha) * target_chosen
    rewards/margins            chosen - rejected
    rewards/accuracies         chosen > rejected
    rewards/source_accuracies  source_chosen > rejected         "hybrid-policy" pairs
    rewards/pivot_accuracies   target_chosen > rejected         pairs of the target itself

Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def preference_metrics(logp: Tensor, reward: Tensor, source_weight: Tensor, alpha: float | Tensor) -> dict[str, Tensor]:
    """The values above, each [B] float32.

    Args:
        logp, reward: [S] float32 in the WRPO layout, S = (K + 2) * B.
        source_weight: [B, K] float32, the shares q_k.
        alpha: fusion coefficient of the step, a number or [].
    """
    examples, num_sources = source_weight.shape
    share = source_weight.t()  # [K, B]
    reward, logp = reward.view(num_sources + 2, examples), logp.view(num_sources + 2, examples)
    source, target, rejected = (share * reward[:-2]).sum(0), reward[-2], reward[-1]
    chosen = alpha * source + (1.0 - alpha) * target
    return {
        "rewards/chosen": chosen,
        "rewards/source_chosen": source,
        "rewards/target_chosen": target,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/source_accuracies": (source > rejected).float(),
        "rewards/pivot_accuracies": (target > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/source_chosen": (share * logp[:-2]).sum(0),
        "logps/target_chosen": logp[-2],
        "logps/rejected": logp[-1],
    }


class RunningMeans:
    """Weighted means of named values, summed on the device in float64; the device is waited for in `pop` only."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # [names + 1], the last is the sum of weights

    def add(self, values: dict[str, Tensor], weight: Tensor) -> None:
        """`values` [B] each, `weight` [B]: 0 leaves an example out, whatever its values."""
        rows = torch.stack([*values.values(), torch.ones_like(weight)]).double()
        sums = torch.where(weight > 0, rows * weight, 0.0).sum(1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.names = list(values)

    def pop(self, accelerator: Any) -> dict[str, float]:
        """The means over everything added on all ranks since the last call; every rank must call it."""
        if self.sums is None:
            return {}
        *sums, weight = accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        return {name: total / weight for name, total in zip(self.names, sums, strict=True)} if weight else {}
