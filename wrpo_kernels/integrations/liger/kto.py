"""Liger's Kahneman-Tversky Optimization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wrpo_kernels.checks import check_device, check_number, check_shape, check_tensor, is_readable
from wrpo_kernels.integrations.liger.sequences import mean_logits, reference_logp, sequence_operands
from wrpo_kernels.kto import kto_layout
from wrpo_kernels.linear_preference_loss import linear_preference_loss


class LigerFusedLinearKTOLoss(nn.Module):
    """liger_kernel.chunked_loss.LigerFusedLinearKTOLoss; `ref_weight` is read and never trained.

        r_s    = beta (log-prob of s - that of the reference), of means with average_log_prob
        loss_s = 1 - sigmoid(r_s - beta kl) where preference_labels[s], else 1 - sigmoid(beta kl - r_s)
        loss   = mean_s loss_s

    forward takes `preference_labels` [S] bool, and `kl` [], [1] or a number, of any sign; without one it is 0.

    Returns (loss, (chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards,
    rejected_rewards)); each of the six is a sum over the sequences of a kind, and only the loss carries a gradient.
    Source: arXiv:2402.01306.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta = ignore_index, beta
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, target = sequence_operands(_input, lin_weight, target, bias, self.ignore_index)
        is_chosen = _checked_labels(preference_labels, target)
        reference = (ref_input, ref_weight, target, ref_bias, self.ignore_index)
        layout = kto_layout(len(target), is_chosen, 0.0, self.beta, 1.0, 1.0, hidden.device)
        out = linear_preference_loss(
            hidden,
            lin_weight,
            target,
            reference_logp(*reference) if self.use_ref_model else None,
            **layout
            | {
                "gamma": layout["seq_weight"] * self.beta * _checked_kl(kl, hidden.device)
            },  # kto_layout's is never below 0
            length_normalize=self.average_log_prob,
            bias=bias,
            ignore_index=self.ignore_index,
        )
        logp = out.logp / (target != self.ignore_index).sum(1) if self.average_log_prob else out.logp
        logits = mean_logits(hidden, lin_weight, bias) * target.shape[1] * lin_weight.shape[0]
        kinds = (is_chosen, ~is_chosen)
        return out.loss, tuple(values.where(kind, 0.0).sum() for values in (logp, logits, out.reward) for kind in kinds)


def _checked_labels(preference_labels: Tensor | None, target: Tensor) -> Tensor:
    if preference_labels is None:
        raise ValueError("preference_labels must be given: [S] bool, True where a sequence is chosen")
    check_tensor("preference_labels", preference_labels)
    check_shape("preference_labels", preference_labels, "[S]", len(target))
    check_device("preference_labels", preference_labels, "target", target.device)
    if preference_labels.dtype != torch.bool:
        raise ValueError(f"preference_labels must be bool, True where chosen, got {preference_labels.dtype}")
    return preference_labels


def _checked_kl(kl: Tensor | float | None, device: torch.device) -> Tensor | float:
    if not isinstance(kl, Tensor):
        check_number("kl", 0.0 if kl is None else kl)
        return kl or 0.0
    if kl.numel() != 1:
        raise ValueError(f"kl must be one number for the batch, [] or [1], got {list(kl.shape)}")
    if not kl.is_floating_point():
        raise ValueError(f"kl must be a float tensor or a number, got {kl.dtype}")
    check_device("kl", kl, "target", device)
    value = kl.detach().float().reshape(())
    if is_readable(value):
        check_number("kl", value.item())
    return value
