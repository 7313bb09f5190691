"""Liger's fused linear cross entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wrpo_kernels.checks import check_number
from wrpo_kernels.cross_entropy import REDUCTIONS, check_class_weight, linear_cross_entropy
from wrpo_kernels.integrations.liger.sequences import NAMES
from wrpo_kernels.integrations.operands import checked_operands
from wrpo_kernels.linear_token_statistics import linear_token_statistics


class CrossEntropyOutput(NamedTuple):
    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None
    predicted_tokens: Tensor | None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss, of _input [N, D] and target [N].

    What the `return_` options ask for costs one more product of the head, without a gradient; `ce_weight` together with
    `lse_square_scale` one more with its gradient.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if use_token_scaling and (ce_weight is not None or label_smoothing or lse_square_scale):
            raise NotImplementedError(
                "use_token_scaling with ce_weight, label_smoothing or lse_square_scale of Liger's fused linear cross "
                "entropy is not supported"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
        check_number("lse_square_scale", lse_square_scale, least=0.0)
        self.reduction, self.use_token_scaling, self.lse_square_scale = reduction, use_token_scaling, lse_square_scale
        self.returned = (return_z_loss, return_token_accuracy, return_predicted_tokens)
        self.head: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        hidden, target = checked_operands(NAMES, _input, lin_weight, target, bias, self.head["ignore_index"])
        if self.ce_weight is not None:
            check_class_weight("ce_weight", self.ce_weight, len(lin_weight), target.device)
        given = (hidden, lin_weight, target)
        loss = linear_cross_entropy(
            *given,
            bias=bias,
            class_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale if self.ce_weight is None else 0.0,
            reduction="none" if self.use_token_scaling else self.reduction,
            **self.head,
        )
        if self.ce_weight is not None and self.lse_square_scale:
            found = linear_token_statistics(*given, outputs=("lse",), bias=bias, **self.head)
            loss = loss + self._reduced(self.lse_square_scale * found.lse**2, target)  # its mean is over tokens
        if self.use_token_scaling:
            loss = self._reduced(loss * torch.exp(-loss.detach()), target)  # by the probability of its label
        return CrossEntropyOutput(loss, *self._beside(*given, bias)) if any(self.returned) else loss

    @torch.no_grad()
    def _beside(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        found = linear_token_statistics(hidden, weight, target, outputs=("lse", "top1"), bias=bias, **self.head)
        is_right = ((found.top1 == target) & (target != self.head["ignore_index"])).float()
        accuracy = is_right if self.reduction == "none" else is_right.sum() / self._number(target)
        values = (self._reduced(self.lse_square_scale * found.lse**2, target), accuracy, found.top1)
        return [value if wanted else None for value, wanted in zip(values, self.returned, strict=True)]

    def _reduced(self, values: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return values
        return values.sum() / (self._number(target) if self.reduction == "mean" else 1)

    def _number(self, target: Tensor) -> Tensor:
        return (target != self.head["ignore_index"]).sum()
