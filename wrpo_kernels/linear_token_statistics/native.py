"""The statistics of rows by the compiled CPU kernels of csrc/cpu/token_statistics.cpp."""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.native import NAME, refuses, run

__all__ = ["NAME", "grad_", "refuses", "statistics"]


def statistics(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    logp: Tensor,
    lse: Tensor,
    values: Tensor,
    top1: Tensor,
) -> None:
    """Writes `values` [N, 6] and `top1` [N] from the logits and their `logp` [N] and `lse` [2, N]."""
    run("token_statistics", logits, target, ignore_index, transform, logp, lse, values, top1)


def grad_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, values: Tensor, coef: Tensor
) -> None:
    """Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k], of the first five columns."""
    run("token_statistics_grad_", logits, target, ignore_index, transform, values, coef)
