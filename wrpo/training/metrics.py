"""What a preference run logs, under the names of the paper's code, and its means over steps and ranks.

Every value is one number a row; q are the shares of the responses of a role in their row, w the weights of
`wrpo.training.response_weights`:

    rewards/source_chosen      sum_k q_k r(source_k)            logps/source_chosen the same of log-probs, nats
    rewards/target_chosen      r(target)                        logps/target_chosen
    rewards/rejected           sum_j q_j r(rejected_j)          logps/rejected
    rewards/chosen             sum of w r over sources and target: alpha_b source_chosen + (1 - alpha_b) target_chosen
    rewards/margins            chosen - rejected
    rewards/accuracies         chosen > rejected
    rewards/source_accuracies  source_chosen > rejected         "hybrid-policy" pairs
    rewards/pivot_accuracies   target_chosen > rejected         pairs of the target itself

A value of sources is of the rows that have one, a value of targets likewise; where no row does, it is not logged.
Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrpo.data.collation import Batch
from wrpo.data.lengths import lengths_of
from wrpo.data.roles import Role

from .response_weights import has_role, response_weights, sum_by_row

# Value: the role that a row must have for it. None: every row has it.
NEEDS: dict[str, str | None] = {
    "rewards/chosen": None,
    "rewards/source_chosen": "source",
    "rewards/target_chosen": "target",
    "rewards/rejected": None,
    "rewards/accuracies": None,
    "rewards/source_accuracies": "source",
    "rewards/pivot_accuracies": "target",
    "rewards/margins": None,
    "logps/source_chosen": "source",
    "logps/target_chosen": "target",
    "logps/rejected": None,
}


def names_of_metrics(rows: Any) -> list[str]:
    """Of the values that these tokenised rows will give; of a stream, of all that there are."""
    if not hasattr(rows, "__len__"):
        return list(NEEDS)
    roles = {role for _, _, of_row in lengths_of(rows) for role in of_row}
    return [name for name, role in NEEDS.items() if role is None or role in roles]


class Measured(NamedTuple):
    """A value of each row, and which rows have it."""

    value: Tensor  # [B]
    holds: Tensor  # [B] bool


def preference_metrics(logp: Tensor, reward: Tensor, batch: Batch, alpha: float | Tensor) -> dict[str, Measured]:
    """The values above, float32.

    Args:
        logp, reward: [S] float32, of each response.
        batch: with `num_responses` [B], `role` [S], `share` [S].
        alpha: fusion coefficient of the step, a number or [].
    """
    role, share = batch["role"], batch["share"]
    weight = response_weights(batch, alpha).float()
    has_source, has_target = has_role(batch, Role.SOURCE), has_role(batch, Role.TARGET)
    every = torch.ones_like(has_source)

    def mean(values: Tensor, of_role: int) -> Tensor:
        return sum_by_row(torch.where(role == of_role, share * values, 0.0), batch)

    source, target, rejected = (mean(reward, of_role) for of_role in (Role.SOURCE, Role.TARGET, Role.REJECTED))
    chosen = sum_by_row(torch.where(role == Role.REJECTED, 0.0, weight * reward), batch)
    return {
        "rewards/chosen": Measured(chosen, every),
        "rewards/source_chosen": Measured(source, has_source),
        "rewards/target_chosen": Measured(target, has_target),
        "rewards/rejected": Measured(rejected, every),
        "rewards/accuracies": Measured((chosen > rejected).float(), every),
        "rewards/source_accuracies": Measured((source > rejected).float(), has_source),
        "rewards/pivot_accuracies": Measured((target > rejected).float(), has_target),
        "rewards/margins": Measured(chosen - rejected, every),
        "logps/source_chosen": Measured(mean(logp, Role.SOURCE), has_source),
        "logps/target_chosen": Measured(mean(logp, Role.TARGET), has_target),
        "logps/rejected": Measured(mean(logp, Role.REJECTED), every),
    }


class RunningMeans:
    """Weighted means of named values, summed on the device in float64; the device is waited for in `pop` only."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # [2, names]: of the values, of their weights

    def add(self, values: dict[str, Measured], weight: Tensor) -> None:
        """`weight` [B]: 0 leaves a row out, whatever its values."""
        weights = torch.stack([weight * measured.holds for measured in values.values()]).double()  # [names, B]
        rows = torch.stack([measured.value for measured in values.values()]).double()
        sums = torch.stack([torch.where(weights > 0, rows * weights, 0.0).sum(1), weights.sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.names = list(values)

    def pop(self, accelerator: Any) -> dict[str, float]:
        """The means over everything added on all ranks since the last call; every rank must call it."""
        if self.sums is None:
            return {}
        totals, weights = accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        return {name: total / w for name, total, w in zip(self.names, totals, weights, strict=True) if w}
