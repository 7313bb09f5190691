"""`linear_cross_entropy` and `LinearCrossEntropy` of cut-cross-entropy, by keyword as that library has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wrpo_kernels.cross_entropy import REDUCTIONS
from wrpo_kernels.cross_entropy import linear_cross_entropy as cross_entropy
from wrpo_kernels.integrations.operands import checked_operands
from wrpo_kernels.linear_token_statistics import linear_token_statistics

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = None,
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `targets` under the head `c`, as cut_cross_entropy.linear_cross_entropy computes it.

    Args:
        e: [..., D] hidden states.
        c: [V, D] head.
        targets: [...] int64 | int32. From here on by keyword: releases differ in the order.
        bias, ignore_index, softcap, reduction: as wrpo_kernels.linear_cross_entropy.
        shift: e[..., t] predicts targets[..., t + shift]; with reduction "none" the result is [..., T - shift].
        filter_eps, filter_e_grad, filter_c_grad: taken and not needed: gradients are exact here. (linear_token_logp's
            `grad_filter` leaves out tokens within a bound.)
        accum_e_fp32, accum_c_fp32: taken and not needed: sums are float32 always.
        impl: taken and not needed; the kernel follows the device.
        return_lse: also return the log-sum-exp of each position, of the shape that reduction "none" has, 0 where
            ignored, with its gradient: for a z-loss of your own.
        vocab_parallel_options: not supported.

    Returns:
        [] or [...] float32, or (loss, lse).

    Raises:
        NotImplementedError: `vocab_parallel_options`.
        ValueError, TypeError, RuntimeError: as wrpo_kernels.linear_cross_entropy.

    Numerics: logits of 16-bit operands are rounded to their type, which cut-cross-entropy's kernels do not do:
        `logits_dtype` of wrpo_kernels.linear_cross_entropy leaves it out.
    """
    if vocab_parallel_options is not None:
        raise NotImplementedError("vocab_parallel_options: a head split over devices is not supported here")
    head: dict[str, Any] = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap, "shift": shift}
    e, targets = checked_operands(("e", "c", "targets", "bias"), e, c, targets, bias, ignore_index)
    if not return_lse:
        loss = cross_entropy(e, c, targets, reduction=reduction, **head)
        return _predicted(loss, shift) if reduction == "none" else loss
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    found = linear_token_statistics(e, c, targets, outputs=("lse",), **head)
    loss, lse = -_predicted(found.logp, shift), _predicted(found.lse, shift)
    if reduction == "mean":
        loss = loss.sum() / (targets[..., int(shift) :] != ignore_index).sum()
    return loss.sum() if reduction == "sum" else loss, lse


def _predicted(values: Tensor, shift: bool | int) -> Tensor:
    """[..., T - shift]: without the last positions, which predict nothing."""
    return values[..., : max(values.shape[-1] - shift, 0)] if shift else values


class LinearCrossEntropy(nn.Module):
    """The same as a module, which holds all but the tensors."""

    def __init__(self, **options: Any) -> None:
        """
        Args:
            options: those of linear_cross_entropy by keyword.
        """
        super().__init__()
        self.options = options

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_cross_entropy(e, c, targets, bias=bias, **self.options)
