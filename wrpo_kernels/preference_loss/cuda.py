"""`preference_loss` by the CUDA kernels of csrc/cuda/preference_loss.cuh and csrc/cuda/sequence_sum.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.dispatch import cuda_launch
from wrpo_kernels.preference_loss.family import LossArguments

NAME = "cuda"


def refuses(logp: Tensor) -> str | None:
    if logp.dtype != torch.float32:
        return f"takes float32 log-probs, got {logp.dtype}"
    return cuda_launch.refuses(logp)


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    value, margin = logp.new_empty(loss.num_groups), logp.new_empty(loss.num_groups)
    reward, coef = torch.empty_like(logp), torch.empty_like(logp)
    inputs = [None if x is None else x.contiguous() for x in (logp, *loss.sequences)]
    sizes = (logp.shape[0], loss.num_groups)
    cuda_launch.launch("preference_loss", logp, *inputs, *sizes, *loss.family.scalars, value, reward, margin, coef)
    return value, reward, margin, coef


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
