"""`preference_loss` by the CUDA kernels of csrc/cuda/preference_loss.cuh and csrc/cuda/sequence_sum.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.dispatch import cuda_launch
from wrpo_kernels.preference_loss.family import LOSS_TYPES, Family

NAME = "cuda"


def refuses(logp: Tensor) -> str | None:
    if logp.dtype != torch.float32:
        return f"takes float32 log-probs, got {logp.dtype}"
    return cuda_launch.refuses(logp)


def forward(
    logp: Tensor,
    ref_logp: Tensor | None,
    seq_weight: Tensor,
    group: Tensor,
    length: Tensor | None,
    nll_weight: Tensor | None,
    group_weight: Tensor | None,
    num_groups: int,
    family: Family,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    loss, margin = logp.new_empty(num_groups), logp.new_empty(num_groups)
    reward, coef = torch.empty_like(logp), torch.empty_like(logp)
    inputs = (logp, ref_logp, seq_weight, group, length, nll_weight, group_weight)
    settled = [None if x is None else x.contiguous() for x in inputs]
    scalars = (family.beta, family.gamma, LOSS_TYPES.index(family.loss_type), *family[3:])
    sizes = (logp.shape[0], num_groups)
    cuda_launch.launch("preference_loss", logp, *settled, *sizes, *scalars, loss, reward, margin, coef)
    return loss, reward, margin, coef


def sequence_sum(rows: Tensor, length: Tensor) -> Tensor:
    """[N] -> [S]: rows stand sequence after sequence, `length` [S] of them each; summed in float64."""
    sums = rows.new_empty(len(length))
    cuda_launch.launch("sequence_sum", rows, rows, length.contiguous(), len(length), len(rows), sums)
    return sums


def over_rows(values: Tensor, length: Tensor, num_rows: int) -> Tensor:
    """[S] -> [N]: every row gets the value of its sequence."""
    rows = values.new_empty(num_rows)
    cuda_launch.launch("over_rows", values, values, length.contiguous(), len(length), num_rows, rows)
    return rows
