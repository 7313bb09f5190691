"""What the ops from hidden states are given: the same tensors and options in each, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    check_backend_name,
    check_device,
    check_float,
    check_grad_filter,
    check_int,
    check_int64,
    check_shape,
    check_tensor,
    int64_labels,
)
from wrpo_kernels.lm_head.adapter import checked_adapter
from wrpo_kernels.lm_head.budget import check_budget
from wrpo_kernels.lm_head.exp_product.form import ExpProduct
from wrpo_kernels.logit_transform import LogitTransform, check_bias, check_scalars, check_transform
from wrpo_kernels.remembered import remembered


class HeadTensors(NamedTuple):
    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    target: Tensor  # [...] int64
    bias: Tensor | None  # [V]
    low: Tensor | None  # [..., r] of an adapter
    up: Tensor | None  # [V, r] of an adapter


class HeadGradients(NamedTuple):
    """Of the tensors that have one; None where it is not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    up: Tensor | None


class Asked(NamedTuple):
    """Which gradients will be asked for. It fixes what is saved, so that a tracing compiler knows its shape too."""

    hidden: bool
    weight: bool
    bias: bool
    low: bool
    up: bool

    @property
    def of_head(self) -> bool:
        return self.weight or self.bias or self.low or self.up

    @property
    def only_hidden(self) -> bool:
        return self.hidden and not self.of_head


class HeadOptions(NamedTuple):
    logit_scale: float
    softcap: float  # 0 is none
    temperature: float
    ignore_index: int
    num_rows: int  # how many labels count, or UNCOUNTED
    budget_bytes: int
    gradients: tuple[bool, ...]  # `Asked`, of which the dispatcher makes a list
    grad_filter: float  # 0 is none
    has_float32_logits: bool  # of 16-bit operands
    backend: str | None

    def logit_bytes(self, hidden: Tensor) -> int:
        """Of a logit; its delta, in the type of `hidden`, takes its place or stands beside it."""
        narrow = hidden.dtype.itemsize
        return 4 + narrow * any(self.gradients) if self.has_float32_logits else narrow

    @property
    def asked(self) -> Asked:
        return self.gradients if isinstance(self.gradients, Asked) else Asked(*self.gradients)

    def transform(self, bias: Tensor | None) -> LogitTransform:
        return LogitTransform(bias, self.logit_scale, self.softcap, self.temperature)


def checked_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None,
    target_name: str = "target",
) -> HeadTensors:
    """Of the arguments of a door; labels in int32 are widened."""
    target = int64_labels(target_name, target)
    check_tensors(hidden, weight, target, ("hidden", "weight", target_name))
    return HeadTensors(hidden, weight, target, bias, *checked_adapter(adapter, hidden, weight))


def check_tensors(
    hidden: Tensor, weight: Tensor, target: Tensor, names: tuple[str, str, str] = ("hidden", "weight", "target")
) -> None:
    """`names` are those that the caller has for the three."""
    of_hidden, of_weight, of_target = names
    for name, value in ((of_hidden, hidden), (of_weight, weight)):
        check_tensor(name, value)
        check_float(name, value)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{of_weight} must be [V, D] with V >= 1 and D >= 1, got {list(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        expected = f"[..., D={weight.shape[1]}] as {of_weight} [V, D]"
        raise ValueError(f"{of_hidden} must be {expected}, got {list(hidden.shape)}")
    check_device(of_weight, weight, of_hidden, hidden.device)
    check_tensor(of_target, target)
    check_int64(of_target, target)
    check_shape(of_target, target, f"{of_hidden}'s leading shape", *hidden.shape[:-1])
    check_device(of_target, target, of_hidden, hidden.device)


def check_head(tensors: HeadTensors, options: HeadOptions) -> None:
    """What the doors check, of an op that may have been called without one."""
    hidden, weight, target, bias, low, up = tensors
    check_tensors(hidden, weight, target)
    checked_adapter(None if low is up is None else (low, up), hidden, weight)
    check_transform(*options.transform(bias), hidden, weight.shape[0])
    if not -1 <= options.num_rows <= target.numel():
        raise ValueError(f"num_rows must be in [0, {target.numel()}], or -1 for uncounted, got {options.num_rows}")
    if options.budget_bytes <= 0:
        raise ValueError(f"budget_bytes must be > 0, got {options.budget_bytes}")
    if options.has_float32_logits and hidden.dtype.itemsize > 2:
        raise ValueError(f"has_float32_logits is for hidden states of 16 bits, got {hidden.dtype}")
    if len(options.gradients) != len(Asked._fields):
        raise ValueError(f"gradients must be {len(Asked._fields)} of True or False, got {len(options.gradients)}")


def checked_options(
    tensors: HeadTensors,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    num_rows: int,
    budget_bytes: int | None,
    grad_filter: float | None,
    logits_dtype: torch.dtype | None,
    backend: str | None,
) -> HeadOptions:
    """`num_rows` labels count, or UNCOUNTED; the others are as the user gives them."""
    hidden, weight, _, bias, _, _ = tensors
    check_bias("bias", bias, hidden, weight.shape[0])
    given = (logit_scale, softcap, temperature, ignore_index, budget_bytes, grad_filter, logits_dtype, backend)
    transform, ignored, budget, rest = _settled(*given, hidden.dtype, hidden.device)
    return HeadOptions(*transform, ignored, num_rows, budget, gradients_asked(tensors), *rest)


@remembered
def _settled(
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    budget_bytes: int | None,
    grad_filter: float | None,
    logits_dtype: torch.dtype | None,
    backend: str | None,
    operands: torch.dtype,
    device: torch.device,
) -> tuple[tuple[float, float, float], int, int, tuple[float, bool, str | None]]:
    """What HeadOptions say of neither rows nor gradients: the transform, an index, a budget, and the last three."""
    check_scalars(logit_scale, softcap, temperature)
    check_int("ignore_index", ignore_index)
    check_backend_name(backend)
    transform = (float(logit_scale), float(softcap or 0.0), float(temperature))
    # "triton_exp" has no logits to round.
    wide = has_float32_logits(logits_dtype, operands) and backend != ExpProduct.NAME
    rest = (check_grad_filter(grad_filter), wide, backend)
    return transform, int(ignore_index), check_budget(budget_bytes, device), rest


def has_float32_logits(logits_dtype: torch.dtype | None, operands: torch.dtype) -> bool:
    """Whether `logits_dtype` asks for wider logits than the operands' own.

    Raises:
        ValueError: another type.
    """
    if logits_dtype in (None, operands):
        return False
    if logits_dtype != torch.float32 or operands.itemsize > 2:
        wider = " or torch.float32" if operands.itemsize == 2 else ""
        raise ValueError(f"logits_dtype must be None, {operands} as hidden{wider}, got {logits_dtype!r}")
    return True


def gradients_asked(tensors: HeadTensors) -> Asked:
    if not torch.is_grad_enabled():
        return Asked(False, False, False, False, False)
    hidden, weight, _, *rest = tensors
    return Asked(*[x is not None and x.requires_grad for x in (hidden, weight, *rest)])
