"""`torch.nn.functional.linear_cross_entropy` of torch 2.13, argument for argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wrpo_kernels.cross_entropy import check_class_weight
from wrpo_kernels.cross_entropy import linear_cross_entropy as cross_entropy
from wrpo_kernels.integrations.operands import checked_operands

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`wrpo_kernels.linear_cross_entropy` under the names of torch: F.cross_entropy(F.linear(input, linear_weight,
    linear_bias), target, ...) without the logits.

    Args:
        input: [..., D].
        linear_weight: [V, D].
        target: [...] int64 | int32.
        linear_bias: [V]. Default: none.
        weight: [V] weight of each class. Default: 1 each.
        reduction, label_smoothing: as wrpo_kernels.linear_cross_entropy.
        ignore_index: Default: -100.
        options: torch's way of cutting the logits; None is the only one here, where `budget_bytes` does it.

    Returns:
        [] or [...], float32; of 16-bit tensors too, where torch rounds the loss to their type.

    Raises:
        NotImplementedError: class probabilities in `target`, a `linear_weight` of more dimensions, `options`.
        ValueError, TypeError, RuntimeError: as wrpo_kernels.linear_cross_entropy.
    """
    if isinstance(target, Tensor) and target.is_floating_point():
        raise NotImplementedError("target must be class indices; class probabilities are not supported")
    if isinstance(linear_weight, Tensor) and linear_weight.dim() > 2:
        raise NotImplementedError(f"linear_weight must be [V, D], got {list(linear_weight.shape)}")
    if options is not None:
        raise NotImplementedError("options belong to torch's own kernel; leave them out")
    names = ("input", "linear_weight", "target", "linear_bias")
    ignore_index = -100 if ignore_index is None else ignore_index
    hidden, target = checked_operands(names, input, linear_weight, target, linear_bias, ignore_index)
    if weight is not None:
        check_class_weight("weight", weight, len(linear_weight), target.device)
    return cross_entropy(
        hidden,
        linear_weight,
        target,
        bias=linear_bias,
        class_weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
