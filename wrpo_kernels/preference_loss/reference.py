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
    scale = torch.ones_like(logp, dtype=torch.float64)  # n_s
    if family.length_normalize:
        scale = (1.0 / length.double()).where(length > 0, 0.0)
    ratio = logp.double() if ref_logp is None else logp.double() - ref_logp.double()
    weight = seq_weight.double()
    reward = family.beta * weighted(scale, ratio)
    # On an accelerator nobody has looked at the groups: one without a sequence and one out of range become NaN.
    is_group = (group >= 0) & (group < num_groups)
    reward, group = reward.where(is_group, torch.nan), group.clamp(0, num_groups - 1)
    margin = reward.new_full((num_groups,), torch.nan).index_fill_(0, group, -family.gamma)
    margin = margin.index_add(0, group, weighted(weight, reward)).where(is_group.all(), torch.nan)
    value, slope = phi(margin, family)
    if group_weight is not None:
        value, slope = weighted(group_weight, value), weighted(group_weight, slope)
    coef = weighted(weight, family.beta * slope[group])
    if nll_weight is not None:
        nll = nll_weight.double()
        value = value.index_add(0, group, weighted(-nll * scale, logp.double()))
        coef = coef - nll
    coef = weighted(scale, coef).where(is_group, torch.nan)
    return tuple(x.to(logp.dtype) for x in (value, reward, margin, coef))


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Their product; a weight of 0 leaves no trace, even of a value that is not finite."""
    return (weight * value).where(weight != 0, 0.0)


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
        return (1 - margin).clamp(min=0), -(margin < 1).to(margin.dtype).where(~margin.isnan(), torch.nan)
    if family.loss_type == "ipo":
        distance = (margin - 0.5) / family.beta  # the margin in log-ratios, minus 1 / (2 beta)
        return distance**2, 2 * distance / family.beta
    eps = family.label_smoothing
    # = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m); without smoothing an infinite margin must not meet a zero
    smoothing = eps * margin if eps else 0.0
    return smoothing - F.logsigmoid(margin), eps - torch.sigmoid(-margin)
