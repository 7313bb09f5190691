"""`linear_cross_entropy` and `LinearCrossEntropy` of cut-cross-entropy, by keyword as that library has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wrpo_kernels.cross_entropy import linear_cross_entropy as cross_entropy
from wrpo_kernels.integrations.autocast import as_linear_takes_it

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
    impl: Any = None,
    vocab_parallel_options: Any = None,
) -> Tensor:
    """Cross entropy of `targets` under the head `c`, as cut_cross_entropy.linear_cross_entropy computes it.

    Args:
        e: [..., D] hidden states.
        c: [V, D] head.
        targets: [...] int64 | int32. From here on by keyword: releases differ in the order.
        bias, ignore_index, softcap, reduction: as wrpo_kernels.linear_cross_entropy.
        shift: e[..., t] predicts targets[..., t + shift]; with reduction "none" the result is [..., T - shift].
        filter_eps: taken and not needed: gradients are exact here. (linear_token_logp's `grad_filter` leaves out
            tokens within a bound.)
        impl: taken and not needed; the kernel follows the device.
        return_lse, vocab_parallel_options: not supported.

    Returns:
        [] or [...] float32.

    Raises:
        NotImplementedError: `return_lse` or `vocab_parallel_options`.
        ValueError, TypeError, RuntimeError: as wrpo_kernels.linear_cross_entropy.
    """
    if return_lse:
        raise NotImplementedError("return_lse: the log-sum-exp is not handed out here")
    if vocab_parallel_options is not None:
        raise NotImplementedError("vocab_parallel_options: a head split over devices is not supported here")
    loss = cross_entropy(
        as_linear_takes_it(e),
        c,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
    )
    if reduction == "none" and shift:
        return loss[..., : max(loss.shape[-1] - shift, 0)]
    return loss


class LinearCrossEntropy(nn.Module):
    """The same as a module, which holds all but the tensors."""

    def __init__(self, **options: Any) -> None:
        """
        Args:
            options: those of linear_cross_entropy by keyword.
        """
        super().__init__()
        self.options = options

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(e, c, targets, bias=bias, **self.options)
