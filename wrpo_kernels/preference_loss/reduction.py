"""From the loss of each group to the number that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import check_constant, check_device, check_number, check_tensor, is_readable


def _checked_normalizer(normalizer: Tensor, loss: Tensor) -> Tensor:
    """[] in a type that leaves the loss its own; the value is read where that does not wait for a device."""
    check_tensor("normalizer", normalizer)
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got {list(normalizer.shape)}")
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, "the loss", loss.device)
    check_constant("normalizer", normalizer)
    normalizer = normalizer.reshape(())
    if is_readable(normalizer):
        check_number("normalizer", normalizer.item(), above=0.0)
        return normalizer
    return normalizer.to(loss.dtype).where((normalizer > 0) & normalizer.isfinite(), torch.nan)


def reduce_loss(loss: Tensor, reduction: str, normalizer: float | Tensor | None, counted: int | Tensor) -> Tensor:
    """[G], or their sum [], -> the scalar that `reduction` and `normalizer` name."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer belongs to reduction='mean', got reduction={reduction!r}")
        if isinstance(normalizer, Tensor):
            normalizer = _checked_normalizer(normalizer, loss)
        else:
            check_number("normalizer", normalizer, above=0.0)
            normalizer = float(normalizer)
    if reduction == "none":
        return loss
    total = loss.sum() if loss.dim() else loss
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = counted if isinstance(counted, Tensor) else max(counted, 1)
    return total / (normalizer.to(total.dtype) if isinstance(normalizer, Tensor) else normalizer)
