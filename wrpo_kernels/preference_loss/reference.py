"""`preference_loss` in plain torch: the specification, and the last resort on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wrpo_kernels.preference_loss.family import KERNELS, Family, LossArguments

NAME = "reference"


def refuses(logp: Tensor) -> str | None:
    return None


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    (ref_logp, seq_weight, group, length, nll_weight, group_weight, group_beta, group_gamma), num_groups, family = loss
    scale = torch.ones_like(logp, dtype=torch.float64)  # n_s
    if family.length_normalize:
        scale = (1.0 / length.double()).where(length > 0, 0.0)
    ratio = logp.double() if ref_logp is None else logp.double() - ref_logp.double()
    weight = seq_weight.double()
    # On an accelerator nobody has looked at the groups: one without a sequence and one out of range become NaN.
    is_group = (group >= 0) & (group < num_groups)
    group = group.clamp(0, num_groups - 1)
    beta = torch.full_like(logp, family.beta, dtype=torch.float64) if group_beta is None else group_beta.double()[group]
    reward = (beta * weighted(scale, ratio)).where(is_group, torch.nan)
    margin = reward.new_full((num_groups,), torch.nan).index_fill_(0, group, 0.0)
    margin = margin - (family.gamma if group_gamma is None else group_gamma.double())
    margin = margin.index_add(0, group, weighted(weight, reward)).where(is_group.all(), torch.nan)
    value, slope = phi(margin, family.beta if group_beta is None else group_beta.double(), family)
    if group_weight is not None:
        value, slope = weighted(group_weight, value), weighted(group_weight, slope)
    coef = weighted(weight, beta * slope[group])
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


def phi(margin: Tensor, beta: float | Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """The loss of a margin and its derivative, both [G]: the formulas of `preference_loss`."""
    kernel = KERNELS[family.kernel]
    if kernel == "ipo":
        return ipo(margin, beta)
    return PHI[kernel](margin, family.shape)


def sigmoid(margin: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    smoothing = shape * margin if shape else 0.0  # without smoothing an infinite margin must not meet a zero
    return smoothing - F.logsigmoid(margin), shape - torch.sigmoid(-margin)


def hinge(margin: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    return (1 - margin).clamp(min=0), -(margin < 1).to(margin.dtype).where(~margin.isnan(), torch.nan)


def ipo(margin: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    distance = (margin - 0.5) / beta  # the margin in log-ratios, minus 1 / (2 beta)
    return distance**2, 2 * distance / beta


def exo_pair(margin: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    q, rest, of_right, of_wrong = torch.sigmoid(margin), torch.sigmoid(-margin), math.log1p(-shape), math.log(shape)
    value = weighted(q, F.logsigmoid(margin) - of_right) + weighted(rest, F.logsigmoid(-margin) - of_wrong)
    return value, weighted(q * rest, margin - of_right + of_wrong)


def discopop(margin: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    t, rest, log_loss = torch.sigmoid(margin / shape), torch.sigmoid(-margin / shape), -F.logsigmoid(margin)
    # t exp(-m) in one exponential: apart, the one is infinite where the other is 0.
    power = torch.where(margin < 0, margin * (1 / shape - 1) if shape != 1 else 0.0, -margin)
    exp_loss = torch.exp(power - torch.log1p(torch.exp(-margin.abs() / shape)))
    slope = exp_loss * (rest / shape - 1) - rest * torch.sigmoid(-margin) - weighted(t * rest / shape, log_loss)
    return weighted(rest, log_loss) + exp_loss, slope


def kto(margin: Tensor, shape: float) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-margin), -torch.sigmoid(margin) * torch.sigmoid(-margin)


PHI = {function.__name__: function for function in (sigmoid, hinge, exo_pair, discopop, kto)}
