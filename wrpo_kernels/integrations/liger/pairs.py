"""Liger's losses of pairs: DPO, CPO, SimPO and ORPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wrpo_kernels.cross_entropy import linear_cross_entropy
from wrpo_kernels.integrations.liger.sequences import mean_logits, reference_logp, sequence_operands
from wrpo_kernels.integrations.operands import checked_operands
from wrpo_kernels.pairwise import linear_dpo_loss
from wrpo_kernels.preference_loss.catalogue import log_odds

DPO_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)

NLL_NAMES = ("_input", "lin_weight", "nll_target", "bias")


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

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.of_pairs(lin_weight, _input, target, bias)

    def of_pairs(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ref_logp: Tensor | None = None,
        nll_elsewhere: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, target = sequence_operands(hidden, weight, target, bias, self.ignore_index)
        pairs = len(target) // 2
        if len(target) != 2 * pairs:
            raise ValueError(
                f"target must be [2B, T], B chosen sequences and then B rejected, got {list(target.shape)}"
            )
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
        means = mean_logits(hidden, weight, bias).view(2, pairs).mean(1)
        return out.loss, (*logp.split(pairs), *means, nll, *out.reward.split(pairs))

    def _of_chosen_tokens(self, length: Tensor, tokens: Tensor) -> Tensor:
        """[B] weights which make of the likelihood term, a mean over pairs, alpha times the mean over tokens."""
        share = (length if self.average_log_prob else torch.ones_like(length)) / tokens
        return self.alpha * len(length) * share


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
        ref_logp = reference_logp(ref_input, ref_weight, target, ref_bias, self.ignore_index)
        return self.of_pairs(lin_weight, _input, target, bias, ref_logp)


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
            hidden, own = checked_operands(NLL_NAMES, _input, lin_weight, own, bias, self.ignore_index)
            half = slice(len(chosen))
            nll = linear_cross_entropy(hidden[half], lin_weight, own[half], bias=bias, ignore_index=self.ignore_index)
            loss = loss + nll
        odds = (log_odds(chosen.double()) - log_odds(rejected.double())).to(chosen.dtype)
        more = (nn.functional.logsigmoid(odds).mean(), odds.mean())
        return loss, (chosen, rejected, *means, nll.detach(), chosen_reward, rejected_reward, *more)
