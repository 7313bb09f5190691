"""Liger-Kernel's losses from hidden states, by the names, arguments and results of liger_kernel 0.8.

    from wrpo_kernels.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearCrossEntropyLoss

What cannot be had here raises NotImplementedError when the module is made. `compiled`, `chunk_size` and `accum_dtype`
are taken and not needed: nothing is compiled, memory is a budget in bytes, and sums are float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wrpo_kernels.cross_entropy import REDUCTIONS, linear_cross_entropy
from wrpo_kernels.integrations.autocast import as_linear_takes_it
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.linear_token_statistics import linear_token_statistics
from wrpo_kernels.lm_head.head import no_autocast
from wrpo_kernels.pairwise import linear_dpo_loss
from wrpo_kernels.preference_loss.catalogue import log_odds

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


DPO_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)


class _Pairs(nn.Module):
    """Chosen sequences, then rejected ones: the loss, and Liger's tuple of what it logs.

        loss = preference loss of the pairs + alpha * mean NLL of all tokens of the chosen

    Returns (loss, (chosen_logps [B], rejected_logps [B], chosen_logits_mean, rejected_logits_mean, nll_loss,
    chosen_rewards [B], rejected_rewards [B])); only the loss carries a gradient.
    """

    def __init__(
        self, ignore_index: int, beta: float, alpha: float, compute_nll_loss: bool, average: bool, **loss: Any
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average
        self.loss = loss

    def of_pairs(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ref_logp: Tensor | None = None,
        nll_elsewhere: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, pairs = as_linear_takes_it(hidden), target.shape[0] // 2
        length = (target != self.ignore_index).sum(1)
        tokens = length[:pairs].sum().clamp(min=1)
        has_nll = self.compute_nll_loss and not nll_elsewhere
        out = linear_dpo_loss(
            hidden,
            weight,
            target,
            ref_logp,
            bias=bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            length_normalize=self.average_log_prob,
            nll_weight=self._of_chosen_tokens(length[:pairs], tokens) if has_nll else 0.0,
            **self.loss,
        )
        nll = -out.logp[:pairs].sum() / tokens if has_nll else out.logp.new_zeros(())
        logp = out.logp / length if self.average_log_prob else out.logp
        means = mean_logits(hidden, weight, bias)
        return out.loss, (*logp.split(pairs), *means, nll, *out.reward.split(pairs))

    def _of_chosen_tokens(self, length: Tensor, tokens: Tensor) -> Tensor:
        """[B] weights which make of the likelihood term, a mean over pairs, alpha times the mean over tokens."""
        share = (length if self.average_log_prob else torch.ones_like(length)) / tokens
        return self.alpha * len(length) * share


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """[] and []: the mean logit over all positions and tokens, of the first half of the sequences and of the second.

    By linearity it is the product of two means, in float32.
    """
    with no_autocast(hidden):
        direction = weight.mean(0, dtype=torch.float32)
        offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
        return tuple(half.mean((0, 1), dtype=torch.float32) @ direction + offset for half in hidden.chunk(2))


class LigerFusedLinearDPOLoss(_Pairs):
    """liger_kernel.chunked_loss.LigerFusedLinearDPOLoss; `ref_weight` is read and never trained.

    A `label_smoothing` that Liger's formula of a loss does not have is refused, where Liger passes over it.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        if loss_type not in DPO_LOSSES:
            raise ValueError(f"loss_type must be one of {list(DPO_LOSSES)}, got {loss_type!r}")
        if loss_type == "exo_pair" and not label_smoothing > 0:
            raise ValueError(f"label_smoothing must be > 0 with loss_type 'exo_pair', got {label_smoothing}")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5) with loss_type 'robust', got {label_smoothing}")
        if label_smoothing and loss_type not in ("exo_pair", "robust"):
            raise NotImplementedError(
                f"Liger's {loss_type} loss has no label_smoothing; wrpo_kernels.linear_dpo_loss has cDPO's"
            )
        loss = {"loss_type": loss_type, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, average_log_prob, **loss)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.use_ref_model:
            return self.of_pairs(lin_weight, _input, target, bias)
        if ref_input is None or ref_weight is None:
            raise ValueError("ref_input and ref_weight must be given with use_ref_model=True")
        with torch.no_grad():
            ref_input = as_linear_takes_it(ref_input)
            token_logp = linear_token_logp(ref_input, ref_weight, target, bias=ref_bias, ignore_index=self.ignore_index)
        return self.of_pairs(lin_weight, _input, target, bias, token_logp.sum(1))


class LigerFusedLinearCPOLoss(_Pairs):
    """liger_kernel.chunked_loss.LigerFusedLinearCPOLoss."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, average_log_prob, label_smoothing=label_smoothing)

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.of_pairs(lin_weight, _input, target, bias)


class LigerFusedLinearSimPOLoss(_Pairs):
    """liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, True, gamma=gamma, label_smoothing=label_smoothing
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.of_pairs(lin_weight, _input, target, bias)


class LigerFusedLinearORPOLoss(_Pairs):
    """liger_kernel.chunked_loss.LigerFusedLinearORPOLoss.

        o(y) = log P - log(1 - P), log P the mean log-prob of y's tokens
        loss = mean NLL of all tokens of the chosen - beta mean_b log sigmoid(o(chosen b) - o(rejected b))

    Returns as the pairs' losses, and mean log sigmoid and mean log odds ratio besides. With `nll_target` the NLL is of
    these labels, one more product of the head. Source: arXiv:2403.07691.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, 1.0, compute_nll_loss, True, loss_type="orpo")

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = nll_target if self.compute_nll_loss else None
        loss, logged = self.of_pairs(lin_weight, _input, target, bias, nll_elsewhere=own is not None)
        chosen, rejected, *means, nll, chosen_reward, rejected_reward = logged
        if own is not None:
            half = as_linear_takes_it(_input)[: len(chosen)], lin_weight, own[: len(chosen)]
            nll = linear_cross_entropy(*half, bias=bias, ignore_index=self.ignore_index)
            loss = loss + nll
        odds = (log_odds(chosen.double()) - log_odds(rejected.double())).to(chosen.dtype)
        more = (nn.functional.logsigmoid(odds).mean(), odds.mean())
        return loss, (chosen, rejected, *means, nll.detach(), chosen_reward, rejected_reward, *more)


class CrossEntropyOutput(NamedTuple):
    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None
    predicted_tokens: Tensor | None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss, of _input [N, D] and target [N].

    What the `return_` options ask for costs one more product of the head, without a gradient.
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
        refused = {
            "ce_weight together with lse_square_scale": ce_weight is not None and lse_square_scale,
            "ce_weight together with label_smoothing and softcap": ce_weight is not None
            and label_smoothing
            and softcap,
            "use_token_scaling with ce_weight, label_smoothing or lse_square_scale": use_token_scaling
            and (ce_weight is not None or label_smoothing or lse_square_scale),
        }
        for name, value in refused.items():
            if value:
                raise NotImplementedError(f"{name} of Liger's fused linear cross entropy is not supported")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
        self.reduction, self.use_token_scaling, self.lse_square_scale = reduction, use_token_scaling, lse_square_scale
        self.returned = (return_z_loss, return_token_accuracy, return_predicted_tokens)
        self.head: dict[str, Any] = {"ignore_index": ignore_index, "softcap": softcap}
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        given = (as_linear_takes_it(_input), lin_weight, target)
        loss = linear_cross_entropy(
            *given,
            bias=bias,
            class_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            reduction="none" if self.use_token_scaling else self.reduction,
            **self.head,
        )
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
