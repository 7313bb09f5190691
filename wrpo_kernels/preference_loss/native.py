"""`preference_loss` by the compiled CPU kernel of csrc/cpu/preference_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.backends import load_extension
from wrpo_kernels.preference_loss.family import LOSS_TYPES, Family

NAME = "native"


def refuses(logp: Tensor) -> str | None:
    if logp.device.type != "cpu":
        return f"runs on cpu tensors, got {logp.device}"
    if logp.dtype != torch.float32:
        return f"takes float32 log-probs, got {logp.dtype}"
    module, reason = load_extension("_cpu")
    return None if module is not None else reason


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
    module, _ = load_extension("_cpu")
    loss, margin = logp.new_empty(num_groups), logp.new_empty(num_groups)
    reward, coef = torch.empty_like(logp), torch.empty_like(logp)
    inputs = (logp, ref_logp, seq_weight, group, length, nll_weight, group_weight)
    settled = [None if x is None else x.contiguous() for x in inputs]  # alive until the kernel returns
    module.preference_loss(
        *(0 if x is None else x.data_ptr() for x in settled),
        logp.shape[0],
        num_groups,
        family.beta,
        family.gamma,
        LOSS_TYPES.index(family.loss_type),
        family.label_smoothing,
        family.length_normalize,
        *(x.data_ptr() for x in (loss, reward, margin, coef)),
    )
    return loss, reward, margin, coef


def sequence_sum(rows: Tensor, length: Tensor) -> Tensor:
    """[N] -> [S]: rows stand sequence after sequence, `length` [S] of them each; summed in float64."""
    module, _ = load_extension("_cpu")
    sums = rows.new_empty(length.shape)
    module.sequence_sum(rows.data_ptr(), length.data_ptr(), length.shape[0], rows.shape[0], sums.data_ptr())
    return sums


def over_rows(values: Tensor, length: Tensor, num_rows: int) -> Tensor:
    """[S] -> [N]: every row gets the value of its sequence."""
    module, _ = load_extension("_cpu")
    rows = values.new_empty(num_rows)
    module.over_rows(values.data_ptr(), length.data_ptr(), length.shape[0], num_rows, rows.data_ptr())
    return rows
