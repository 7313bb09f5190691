"""`preference_loss` in plain torch: the specification, and the last resort on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wrpo_kernels.preference_loss.family import Family, LossArguments

NAME = "reference"


def refuses(logp: Tensor) -> str | None:
    return None


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    (ref_logp, seq_weight, group, length, nll_weight, group_weight), num_groups, family = loss
    scale = 1.0  # n_s
    if family.length_normalize:
        scale = (1.0 / length.double()).where(length > 0, 0.0)
    ratio = logp.double() if ref_logp is None else logp.double() - ref_logp.double()
    weight = seq_weight.double()
    reward = family.beta * scale * ratio
    if family.length_normalize:
        reward = reward.where(length > 0, 0.0)
    zeros = reward.new_zeros(num_groups)
    margin = zeros.index_add(0, group, (weight * reward).where(weight != 0, 0.0)) - family.gamma
    value, slope = phi(margin, family)
    if group_weight is not None:
        # A group of weight zero leaves no trace, even where its log-probs are not finite.
        value = (value * group_weight).where(group_weight != 0, 0.0)
        slope = (slope * group_weight).where(group_weight != 0, 0.0)
    coef = scale * family.beta * weight * slope[group]
    if nll_weight is not None:
        nll = nll_weight.double() * scale
        value = value.index_add(0, group, (-nll * logp.double()).where(nll != 0, 0.0))
        coef = coef - nll
    return tuple(x.to(logp.dtype) for x in (value, reward, margin, coef))


def sequence_sum(rows: Tensor, length: Tensor) -> Tensor:
    """[N] -> [S]: rows stand sequence after sequence, `length` [S] of them each; summed in float64."""
    sums = rows.new_zeros(len(length), dtype=torch.float64)
    return sums.index_add_(0, sequence_of_row(length), rows.double()).to(rows.dtype)


def over_rows(values: Tensor, length: Tensor, num_rows: int) -> Tensor:
    """[S] -> [N]: every row gets the value of its sequence."""
    return values[sequence_of_row(length)]


def sequence_of_row(length: Tensor) -> Tensor:
    return torch.arange(len(length), device=length.device).repeat_interleave(length)


def phi(margin: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """The loss of a margin and its derivative, both [G]."""
    if family.loss_type == "hinge":
        return (1 - margin).clamp(min=0), -(margin < 1).to(margin.dtype)
    if family.loss_type == "ipo":
        distance = (margin - 0.5) / family.beta  # the margin in log-ratios, minus 1 / (2 beta)
        return distance**2, 2 * distance / family.beta
    eps = family.label_smoothing
    # = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m); without smoothing an infinite margin must not meet a zero
    smoothing = eps * margin if eps else 0.0
    return smoothing - F.logsigmoid(margin), eps - torch.sigmoid(-margin)
