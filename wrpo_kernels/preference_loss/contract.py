"""The registered op `wrpo::preference_loss`: its check, schema, fake and autograd.

The op returns the loss of each group, unreduced: reductions and normalisers are plain torch around it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from wrpo_kernels.checks import check_constant, check_device, check_int64, check_shape, check_tensor
from wrpo_kernels.dispatch.autograd import register_differentiable
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.preference_loss import cuda, native, reference
from wrpo_kernels.preference_loss.family import Family, check_family

CANDIDATES = (native, cuda, TritonBackend("wrpo_kernels.preference_loss.triton_kernel"), reference)

torch.library.define(
    "wrpo::preference_loss",
    "(Tensor logp, Tensor? ref_logp, Tensor seq_weight, Tensor group, Tensor? length, Tensor? nll_weight, "
    "Tensor? group_weight, SymInt num_groups, float beta, float gamma, str loss_type, float label_smoothing, "
    "bool length_normalize, str? backend) -> (Tensor loss, Tensor reward, Tensor margin, Tensor coef)",
)


def check_logp(logp: Tensor) -> None:
    check_tensor("logp", logp)
    if logp.dim() != 1 or logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp must be [S] float32 sequence log-probs, got {list(logp.shape)} {logp.dtype}")


def check(
    like: Tensor,
    ref_logp: Tensor | None,
    seq_weight: Tensor,
    group: Tensor,
    length: Tensor | None,
    nll_weight: Tensor | None,
    group_weight: Tensor | None,
    num_groups: int,
    family: Family,
) -> None:
    """All but the log-probs, whose shape [S] and device `like` has."""
    _check_constants("seq_weight", seq_weight, "[S]", like.shape[0], like)
    for name, value in (("ref_logp", ref_logp), ("nll_weight", nll_weight)):
        if value is not None:
            _check_constants(name, value, "[S]", like.shape[0], like)
    _check_counts("group", group, like)
    if length is not None:
        _check_counts("length", length, like)
    if group_weight is not None:
        _check_constants("group_weight", group_weight, "[G]", num_groups, like)
    check_family(family.beta, family.gamma, family.loss_type, family.label_smoothing)
    if family.length_normalize and length is None:
        raise ValueError("length_normalize=True needs length, the number of counted tokens of each sequence [S]")


def _check_constants(name: str, value: Tensor, letters: str, size: int, like: Tensor) -> None:
    check_tensor(name, value)
    check_shape(name, value, letters, size)
    check_device(name, value, "logp", like.device)
    check_constant(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32, got {value.dtype}: 16 bits round a summed log-prob by whole nats")


def _check_counts(name: str, value: Tensor, like: Tensor) -> None:
    check_tensor(name, value)
    check_int64(name, value)
    check_shape(name, value, "[S]", like.shape[0])
    check_device(name, value, "logp", like.device)


def check_groups(group: Tensor, num_groups: int) -> None:
    """The values of `group`; on an accelerator this would wait for the device, so only CPU tensors are read."""
    if group.device.type == "cpu" and group.numel() and not is_compiling():
        numbers = group.tolist()
        low, high = min(numbers), max(numbers)
        if low < 0 or high >= num_groups:
            raise ValueError(f"group must be in [0, G={num_groups}), got values from {low} to {high}")


def _preference_loss(logp, ref_logp, seq_weight, group, length, nll_weight, group_weight, num_groups, *options):
    *family, backend = options
    check_groups(group, num_groups)
    kernel = choose("preference_loss", backend, CANDIDATES, logp)
    constants = as_constants(logp.dtype, ref_logp, seq_weight, group, length, nll_weight, group_weight)
    return kernel.forward(logp, *constants, num_groups, Family(*family))


def as_constants(dtype: torch.dtype, ref_logp, seq_weight, group, length, nll_weight, group_weight) -> tuple:
    """The arguments after `logp`, the floating ones in its type."""
    ref_logp, seq_weight, nll_weight, group_weight = [
        x if x is None or x.dtype == dtype else x.to(dtype) for x in (ref_logp, seq_weight, nll_weight, group_weight)
    ]
    return ref_logp, seq_weight, group, length, nll_weight, group_weight


@torch.library.register_fake("wrpo::preference_loss")
def _fake(logp, ref_logp, seq_weight, group, length, nll_weight, group_weight, num_groups, *options):
    check_logp(logp)
    check(logp, ref_logp, seq_weight, group, length, nll_weight, group_weight, num_groups, Family(*options[:-1]))
    loss, reward = logp.new_empty(num_groups), torch.empty_like(logp)
    return loss, reward, torch.empty_like(loss), torch.empty_like(reward)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[3], output[3])  # group, coef


def _backward(ctx, grad_loss, *_):
    group, coef = ctx.saved_tensors
    return (coef * grad_loss[group],) + (None,) * 6


preference_loss = register_differentiable("preference_loss", _preference_loss, _save, _backward)
