"""The statistics of rows by the CUDA kernels of csrc/cuda/token_statistics.cuh."""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.linear_token_statistics.wanted import Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.cuda import NAME, check_labels_if_asked, launch_rows, refuses

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
    """Writes `values` [N, 6] of COLUMNS and `top1` [N]."""
    check_labels_if_asked(logits, target, ignore_index)
    flags = sum(1 << bit for bit, is_wanted in enumerate(wanted) if is_wanted)
    launch_rows("token_statistics", logits, target, ignore_index, transform, flags, values, top1)


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
    launch_rows("token_statistics_grad_", logits, target, ignore_index, transform, values, coef)
