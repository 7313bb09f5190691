"""`preference_loss` by the compiled CPU kernel of csrc/cpu/preference_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.preference_loss.family import LossArguments

NAME = "native"


def refuses(logp: Tensor) -> str | None:
    if not logp.is_cpu:
        return f"runs on cpu tensors, got {logp.device}"
    if logp.dtype != torch.float32:
        return f"takes float32 log-probs, got {logp.dtype}"
    module, reason = load_extension("_cpu")
    return None if module is not None else reason


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    module, _ = load_extension("_cpu")
    value, margin = logp.new_empty(loss.num_groups), logp.new_empty(loss.num_groups)
    reward, coef = torch.empty_like(logp), torch.empty_like(logp)
    out = (value, reward, margin, coef)
    inputs = [None if x is None else x.contiguous() for x in (logp, *loss.sequences)]  # alive until the kernel returns
    module.preference_loss(
        *[0 if x is None else x.data_ptr() for x in inputs],
        logp.shape[0],
        loss.num_groups,
        *loss.family.scalars,
        *[x.data_ptr() for x in out],
    )
    return out


def of_rows(token_logp: Tensor, loss: LossArguments, divisor: int) -> tuple[Tensor, ...]:
    """From rows [N] that stand sequence after sequence, `length` [S] of them each, summed in float64.

    Returns `total` [], the sum of the losses over `divisor`, `loss` [G], `logp` [S], `reward` [S], `margin` [G] and
    `coef` [N, 1] = d total / d token_logp.
    """
    module, _ = load_extension("_cpu")
    (num_rows,), (num_sequences,), num_groups = token_logp.shape, loss.sequences.length.shape, loss.num_groups
    sizes = ((), num_groups, num_sequences, num_sequences, num_groups, (num_rows, 1))
    out = tuple([token_logp.new_empty(size) for size in sizes])
    inputs = [None if x is None else x.contiguous() for x in loss.sequences]  # alive until the kernel returns
    module.preference_loss_of_rows(
        token_logp.data_ptr(),
        num_rows,
        *[0 if x is None else x.data_ptr() for x in inputs],
        num_sequences,
        num_groups,
        *loss.family.scalars,
        divisor,
        *[x.data_ptr() for x in out],
    )
    return out
