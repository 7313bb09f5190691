"""The registered op `wrpo::preference_loss`: its check, schema, fake and autograd.

The op returns the loss of each group, unreduced: reductions and normalisers are plain torch around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_constant, check_device, check_int64, check_shape, check_tensor, is_readable
from wrpo_kernels.dispatch.autograd import register_differentiable
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.dispatch.schema import Arguments
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.preference_loss import cuda, native, reference
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences, check_family

CANDIDATES = (native, cuda, TritonBackend("wrpo_kernels.preference_loss.triton_kernel"), reference)


def check_logp(logp: Tensor) -> None:
    check_tensor("logp", logp)
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp must be [S] float32 sequence log-probs, got {list(logp.shape)} {logp.dtype}")


def check(like: Tensor, loss: LossArguments) -> None:
    """All but the log-probs, whose shape [S] and device `like` has."""
    sequences, num_groups, family = loss
    _check_constants("seq_weight", sequences.seq_weight, "[S]", like.shape[0], like)
    for name, value in (("ref_logp", sequences.ref_logp), ("nll_weight", sequences.nll_weight)):
        if value is not None:
            _check_constants(name, value, "[S]", like.shape[0], like)
    _check_counts("group", sequences.group, like)
    if like.shape[0] and not num_groups:
        raise ValueError(f"num_groups must be >= 1 for {like.shape[0]} sequences, got 0")
    if sequences.length is not None:
        _check_counts("length", sequences.length, like)
    of_groups = {"group_weight": sequences.group_weight, "beta": sequences.group_beta, "gamma": sequences.group_gamma}
    for name, value in of_groups.items():
        if value is not None:
            _check_constants(name, value, "[G]", num_groups, like)
    check_family(family)
    if family.length_normalize and sequences.length is None:
        raise ValueError("length_normalize=True needs length, the number of counted tokens of each sequence [S]")


def _check_constants(name: str, value: Tensor, letters: str, size: int, like: Tensor) -> None:
    check_tensor(name, value)
    check_shape(name, value, letters, size)
    check_device(name, value, "logp", like.device)
    check_constant(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        reason = ": 16 bits round a summed log-prob by whole nats" if name == "ref_logp" else f"; pass {name}.float()"
        raise ValueError(f"{name} must be float32, got {value.dtype}{reason}")


def _check_counts(name: str, value: Tensor, like: Tensor) -> None:
    check_tensor(name, value)
    check_int64(name, value)
    check_shape(name, value, "[S]", like.shape[0])
    check_device(name, value, "logp", like.device)


def check_groups(group: Tensor, num_groups: int) -> None:
    """The values of `group`, where reading them does not wait; elsewhere the kernels make NaN of wrong ones."""
    if is_readable(group):
        check_group_numbers(group.tolist(), num_groups)


def check_group_numbers(numbers: list[int], num_groups: int) -> None:
    """Every group has a sequence: one without would count in the mean, with the loss of a margin of -gamma."""
    found = set(numbers)
    low, high = min(found, default=0), max(found, default=-1)
    if low < 0 or high >= num_groups:
        raise ValueError(f"group must be in [0, G={num_groups}), got values from {low} to {high}")
    if len(found) < num_groups:
        missing = next(g for g in range(num_groups) if g not in found)
        raise ValueError(
            f"group must name every group of [0, G={num_groups}), but no sequence is in group {missing}; "
            "group.unique(return_inverse=True)[1] numbers them without gaps"
        )


def _preference_loss(
    logp: Tensor, sequences: Sequences, num_groups: int, family: Family, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_groups(sequences.group, num_groups)
    kernel = choose(backend, CANDIDATES, logp)
    return kernel.forward(logp, LossArguments(in_dtype(logp.dtype, sequences), num_groups, family))


def _check(logp: Tensor, sequences: Sequences, num_groups: int, family: Family, backend: str | None) -> None:
    check_logp(logp)
    check(logp, LossArguments(sequences, num_groups, family))


def in_dtype(dtype: torch.dtype, sequences: Sequences) -> Sequences:
    """With the floating tensors in the type of the log-probs."""
    same = (dtype, torch.int64)
    return Sequences(*[x if x is None or x.dtype in same else x.to(dtype) for x in sequences])


def _fake(
    logp: Tensor, sequences: Sequences, num_groups: int, family: Family, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, reward = logp.new_empty(num_groups), torch.empty_like(logp)
    return loss, reward, torch.empty_like(loss), torch.empty_like(reward)


def _save(ctx: Any, outputs: tuple[Tensor, ...], logp: Tensor, sequences: Sequences, *_: Any) -> None:
    _, *constants = outputs
    _, _, coef = constants
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(sequences.group, coef)


def _backward(ctx: Any, grad_loss: Tensor, *_: None) -> dict[str, Tensor]:
    group, coef = ctx.saved_tensors
    if not is_readable(group):  # a group out of range made NaN of its coefficient: its index must not be followed
        group = group.clamp(0, grad_loss.shape[0] - 1)
    return {"logp": coef * grad_loss.index_select(0, group)}


preference_loss = register_differentiable(
    "preference_loss",
    Arguments("Tensor logp", Sequences, "SymInt num_groups", Family, "str? backend"),
    "Tensor loss, Tensor reward, Tensor margin, Tensor coef",
    check=_check,
    kernel=_preference_loss,
    fake=_fake,
    save=_save,
    backward=_backward,
)
