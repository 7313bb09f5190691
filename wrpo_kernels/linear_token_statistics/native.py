"""The statistics of rows by the compiled CPU kernels of csrc/cpu/token_statistics.cpp."""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.linear_token_statistics.reference import write_logp
from wrpo_kernels.linear_token_statistics.wanted import Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.native import NAME, forward, refuses, run

__all__ = ["NAME", "grad_", "refuses", "statistics"]


def statistics(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    wanted: Wanted,
    values: Tensor,
    top1: Tensor,
) -> None:
    """Writes `values` [N, 6] of COLUMNS and `top1` [N]; all of them where one is wanted."""
    logp, lse = values.new_empty(len(logits)), values.new_empty(2, len(logits))
    forward(logits, target, ignore_index, transform, logp, lse)
    if any(wanted):
        run("token_statistics", logits, target, ignore_index, transform, logp, lse, values, top1)
    else:
        write_logp(logp, lse, values, top1)


def grad_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    wanted: Wanted,
    values: Tensor,
    coef: Tensor,
) -> None:
    """Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k], of the first five columns."""
    run("token_statistics_grad_", logits, target, ignore_index, transform, values, coef)
