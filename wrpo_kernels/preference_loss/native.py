"""`preference_loss` by the compiled CPU kernel of csrc/cpu/preference_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss.family import LossArguments
from wrpo_kernels.token_logp.native import rows_of

NAME = "native"


def refuses(logp: Tensor) -> str | None:
    if not logp.is_cpu:
        return f"runs on cpu tensors, got {logp.device}"
    if logp.dtype != torch.float32:
        return f"takes float32 log-probs, got {logp.dtype}"
    module, reason = load_extension("_cpu")
    return None if module is not None else reason


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, ...]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    num_sequences, num_groups = len(logp), loss.num_groups
    logp = logp.contiguous()  # alive until the kernel returns
    return _run("preference_loss", (logp.data_ptr(),), loss, (), (num_groups, num_sequences, num_groups, num_sequences))


def of_rows(token_logp: Tensor, loss: LossArguments, divisor: int) -> tuple[Tensor, ...]:
    """From rows [N] that stand sequence after sequence, `length` [S] of them each, summed in float64.

    Returns `total` [], the sum of the losses over `divisor`, `loss` [G], `logp` [S], `reward` [S], `margin` [G] and
    `coef` [N, 1] = d total / d token_logp.
    """
    num_rows, num_sequences, num_groups = len(token_logp), len(loss.sequences.seq_weight), loss.num_groups
    sizes = ((), num_groups, num_sequences, num_sequences, num_groups, (num_rows, 1))
    return _run("preference_loss_of_rows", (token_logp.data_ptr(), num_rows), loss, (divisor,), sizes)


def of_logits_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, loss: LossArguments, divisor: int
) -> tuple[Tensor, ...]:
    """`total`, `logp`, `reward`, `margin` and `coef` from logits [N, V], with a transform without bias; leaves
    d total / d logits in their place."""
    num_rows, num_sequences, num_groups = len(logits), len(loss.sequences.seq_weight), loss.num_groups
    rows = (*rows_of(logits, target, ignore_index), *transform.scalars, torch.get_num_threads())
    sizes = ((), num_sequences, num_sequences, num_groups, (num_rows, 1))
    return _run("preference_loss_of_logits_", rows, loss, (divisor,), sizes)


def _run(kernel: str, rows: tuple, loss: LossArguments, divisor: tuple[int, ...], sizes: tuple) -> tuple[Tensor, ...]:
    """What the kernel writes, float32 of these sizes."""
    module, _ = load_extension("_cpu")
    sequences, num_groups, family = loss
    out = tuple([sequences.seq_weight.new_empty(size) for size in sizes])
    inputs = [None if x is None else x.contiguous() for x in sequences]  # alive until the kernel returns
    getattr(module, kernel)(
        *rows,
        *[0 if x is None else x.data_ptr() for x in inputs],
        len(sequences.seq_weight),
        num_groups,
        *family.scalars,
        *divisor,
        *[x.data_ptr() for x in out],
    )
    return out
