"""The losses of TRL's names that are no function of one margin, and sums of several: all of them in the family's op.

With R+ and R- the rewards of a group's positive and negative weights, so that its margin is R+ - R- - gamma, a loss is
a sum of terms, each the factor times a loss of the margin `chosen R+ - rejected R-`:

    sigmoid_norm  sigmoid, ipo of log-ratios divided by their lengths                              as "sigmoid", "ipo"
    ipo_norm
    bco_pair      -log sigmoid(R+) - log sigmoid(-R-)                                              arXiv:2404.04656
    nca_pair      -log sigmoid(R+) - (log sigmoid(-R+) + log sigmoid(-R-)) / 2                     arXiv:2402.05369
    sppo_hard     (R+ / beta - 1 / (2 beta))^2 + (R- / beta + 1 / (2 beta))^2                      arXiv:2405.00675
    apo_zero      1 - sigmoid(R+) + sigmoid(R-)                                                    arXiv:2408.06266
    apo_down      sigmoid(R+) + 1 - sigmoid(R+ - R-)                                               arXiv:2408.06266
    orpo          -beta log sigmoid(sum of w (l - log(1 - e^l))), l = logp / length                arXiv:2403.07691

and, of all groups of the call together,

    aot           sigmoid of margins of the policy and of the reference, each sorted               arXiv:2406.05882
    aot_unpaired  sigmoid of R+ - R-, each sorted                                                  arXiv:2406.05882
    sft           -sum of w logp over the positive weights, over the same sum of their lengths

gamma joins the terms that have both sides, and aot. Every term is one call of the op, whose kernels hold the formulas
and the slopes; nothing here has a derivative of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.checks import check_number
from wrpo_kernels.preference_loss import contract
from wrpo_kernels.preference_loss.divergence import Divergence, score
from wrpo_kernels.preference_loss.family import LOSS_TYPES, SMOOTHED, Family, LossArguments, Sequences, check_smoothing
from wrpo_kernels.preference_loss.reference import weighted


class Term(NamedTuple):
    loss_type: str  # of the family
    chosen: float = 1
    rejected: float = 1
    factor: float = 1
    by_length: bool = False


TERMS: dict[str, tuple[Term, ...]] = {name: (Term(name),) for name in LOSS_TYPES} | {
    "sigmoid_norm": (Term("sigmoid", by_length=True),),
    "ipo_norm": (Term("ipo", by_length=True),),
    "bco_pair": (Term("sigmoid", 1, 0), Term("sigmoid", 0, 1)),
    "nca_pair": (Term("sigmoid", 1, 0), Term("sigmoid", -1, 0, 0.5), Term("sigmoid", 0, 1, 0.5)),
    "sppo_hard": (Term("ipo", 1, 0), Term("ipo", 0, 1)),
    "apo_zero": (Term("kto", 1, 0), Term("kto", 0, 1)),
    "apo_down": (Term("kto", -1, 0), Term("kto")),
    "aot": (Term("sigmoid"),),
    "aot_unpaired": (Term("sigmoid"),),
    "orpo": (Term("sigmoid"),),
}
CATALOGUE = (*TERMS, "sft")
BY_LENGTH = ("sigmoid_norm", "ipo_norm", "sft", "orpo")
OF_DIVERGENCES = (*LOSS_TYPES, "sigmoid_norm", "ipo_norm", "sft")
SURE = -(2.0**-24)  # log of the largest float32 below 1


class Mixture(NamedTuple):
    """A weighted sum of losses of the catalogue, of log-ratios that a divergence may bend."""

    loss_types: tuple[str, ...]
    weights: tuple[float, ...]
    divergence: Divergence


def family_or_mixture(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None, divergence: Divergence
) -> tuple[str, Mixture | None]:
    """The loss of the family, which the kernels have; or "sigmoid" in its place, and a mixture."""
    if not isinstance(loss_type, (str, list, tuple)):  # a set has no order for weights to follow
        raise TypeError(f"loss_type must be a name or a list of names, got {type(loss_type).__name__}")
    names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    for name in names or ("",):
        if name not in CATALOGUE:
            raise ValueError(f"loss_type must be one of {list(CATALOGUE)}, or a list of them, got {loss_type!r}")
    if loss_weights is not None and not isinstance(loss_weights, Iterable):
        raise TypeError(f"loss_weights must be a list of numbers, one a loss_type, got {loss_weights!r}")
    weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
    if len(weights) != len(names):
        raise ValueError(f"loss_weights must be {len(names)} numbers, one a loss_type, got {len(weights)}")
    for weight in weights:
        check_number("loss_weights", weight)
    divergence.check()
    unfit = [name for name in names if name not in OF_DIVERGENCES]
    if divergence.bends and unfit:
        # Its reward lacks a constant of the prompt, beta log Z, which cancels in the difference of two alone.
        raise ValueError(f"f_divergence_type {divergence.kind!r} belongs to losses of one margin, got {unfit[0]!r}")
    if names[0] in LOSS_TYPES and weights == (1.0,) and not divergence.bends:
        return names[0], None
    return "sigmoid", Mixture(names, weights, divergence)


def check_mixture(mixture: Mixture, loss: LossArguments) -> None:
    check_smoothing(loss.family.label_smoothing, mixture.loss_types)
    has_gamma = loss.family.gamma != 0 or loss.sequences.group_gamma is not None
    if has_gamma and not any(_has_margin(name) for name in mixture.loss_types):
        raise ValueError(f"gamma belongs to a margin, which loss_type {', '.join(mixture.loss_types)!r} has none of")
    if mixture.divergence.bends and loss.sequences.ref_logp is None:
        kind = mixture.divergence.kind
        raise ValueError(f"f_divergence_type {kind!r} bends the log-ratio to a reference: it needs ref_logp, got None")
    by_length = [name for name in mixture.loss_types if name in BY_LENGTH]
    if by_length and loss.sequences.length is None:
        raise ValueError(f"loss_type {by_length[0]!r} needs length, the number of counted tokens of each sequence [S]")


def _has_margin(name: str) -> bool:
    return name != "orpo" and any(term.chosen == term.rejected == 1 for term in TERMS.get(name, ()))


def mixed_loss(
    logp: Tensor, loss: LossArguments, mixture: Mixture, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each group [G], its likelihood term included; and without a gradient reward [S] and margin [G]."""
    sequences, num_groups, family = loss
    # With group weights of 0 the op's own loss is the likelihood term alone.
    likelihood = _changed(sequences, group_weight=logp.detach().new_zeros(num_groups))
    total, reward, margin, _ = contract.preference_loss(logp, likelihood, num_groups, family, backend)
    for name, weight in zip(mixture.loss_types, mixture.weights, strict=True):
        if name == "sft":
            value = _token_mean(logp, loss)
        else:
            value = _sum_of_terms(name, logp, loss, mixture.divergence, backend)
        total = total + weight * value
    return total, reward, margin


def _sum_of_terms(name: str, logp: Tensor, loss: LossArguments, divergence: Divergence, backend: str | None) -> Tensor:
    """[G], a loss of the table above."""
    logp, (sequences, num_groups, family) = _operands(name, logp, loss, divergence)
    eps = family.label_smoothing if name in SMOOTHED else 0.0
    values = []
    for term in TERMS[name]:
        weight, gamma, group_gamma = sequences.seq_weight, family.gamma, sequences.group_gamma
        if not term.chosen == term.rejected == 1:
            weight = weight * torch.where(weight > 0, term.chosen, term.rejected)
            gamma, group_gamma = 0.0, None
        by_length = family.length_normalize or term.by_length
        kind = Family(family.beta, gamma, term.loss_type, eps, family.discopop_tau, by_length)
        of_term = _changed(sequences, seq_weight=weight, group_gamma=group_gamma)
        value, *_ = contract.preference_loss(logp, of_term, num_groups, kind, backend)
        values.append(term.factor * value)
    return torch.stack(values).sum(0)


def _operands(name: str, logp: Tensor, loss: LossArguments, divergence: Divergence) -> tuple[Tensor, LossArguments]:
    """What the terms of a loss are taken of."""
    sequences, num_groups, family = loss
    sequences = _changed(sequences, nll_weight=None)
    if name == "aot":
        sequences = _against_sorted_reference(logp.detach(), sequences, num_groups, family)
    elif name == "aot_unpaired":
        sequences = _with_sorted_rejected(logp.detach(), sequences, num_groups, family)
    elif name == "orpo":
        mean = (logp.double() / sequences.length.clamp(min=1)).where(sequences.length > 0, -1.0)  # of none: any
        logp, sequences = log_odds(mean).to(logp.dtype), _weighted_by_beta(sequences, num_groups, family)
        family = Family(1.0, 0.0, "sigmoid", 0.0, family.discopop_tau, False)
    elif divergence.bends:
        logp = score(logp - sequences.ref_logp, divergence)
        sequences = _changed(sequences, ref_logp=None)
    return logp, LossArguments(sequences, num_groups, family)


def _token_mean(logp: Tensor, loss: LossArguments) -> Tensor:
    """[G], whose mean over the groups of weight not 0 is the negative log-likelihood a token of what is preferred.

    As in every loss, the weight of a group multiplies its value.
    """
    sequences, num_groups, _ = loss
    share = factor = sequences.seq_weight.double().clamp(min=0.0)  # [S]
    counted: int | Tensor = num_groups
    if sequences.group_weight is not None:
        weight = sequences.group_weight[sequences.group.clamp(0, num_groups - 1)]
        share, factor = share.where(weight != 0, 0.0), share * weight
        counted = (sequences.group_weight != 0).sum()
    tokens = (share * sequences.length).sum().clamp(min=torch.finfo(torch.float32).tiny)
    nll = weighted(-factor * counted / tokens, logp.double())
    return _by_group(nll, sequences.group, num_groups).to(logp.dtype)


def log_odds(mean: Tensor) -> Tensor:
    """log p - log(1 - p) of mean log-probs a token, float64, p = exp(mean).

    Of p above the largest float32 below 1 value and slope are those of that number, 16.6 and 1.7e7: finite also of
    log-probs that were rounded to 0, and not a slope of 0, which would end the learning of what is nearly sure.
    """
    mean = mean - (mean.detach() - SURE).clamp(min=0.0)
    return mean - torch.log(-torch.expm1(mean))


def _weighted_by_beta(sequences: Sequences, num_groups: int, family: Family) -> Sequences:
    """Without a reference and a margin, beta as the weight of the group."""
    ones = torch.ones(num_groups, dtype=sequences.seq_weight.dtype, device=sequences.seq_weight.device)
    weight = ones if sequences.group_weight is None else sequences.group_weight
    beta = family.beta if sequences.group_beta is None else sequences.group_beta
    return _changed(sequences, ref_logp=None, group_beta=None, group_gamma=None, group_weight=weight * beta)


def _against_sorted_reference(logp: Tensor, sequences: Sequences, num_groups: int, family: Family) -> Sequences:
    """Without a reference: the margin of the reference that has the same rank stands in the group's gamma."""
    policy, reference = (
        _by_group(weighted(sequences.seq_weight, part), sequences.group, num_groups)
        for part in _per_sequence(logp, sequences, family)
    )
    matched = reference[_partner(policy, reference, sequences)]
    beta: float | Tensor = family.beta if sequences.group_beta is None else sequences.group_beta
    gamma: float | Tensor = family.gamma if sequences.group_gamma is None else sequences.group_gamma
    return _changed(sequences, ref_logp=None, group_gamma=(gamma + beta * matched).to(logp.dtype))


def _with_sorted_rejected(logp: Tensor, sequences: Sequences, num_groups: int, family: Family) -> Sequences:
    """The rejected responses of a group moved to the one whose R+ has the rank of their R-."""
    weight, group = sequences.seq_weight, sequences.group
    policy, reference = _per_sequence(logp, sequences, family)
    is_group, own = (group >= 0) & (group < num_groups), group.clamp(0, num_groups - 1)
    beta = None if sequences.group_beta is None else sequences.group_beta.double()
    ratio = policy - reference if beta is None else beta[own] * (policy - reference)
    chosen = _by_group(weighted(weight.clamp(min=0), ratio), group, num_groups)
    rejected = _by_group(weighted((-weight).clamp(min=0), ratio), group, num_groups)
    partner = _partner(rejected, chosen, sequences)  # of the rejected side of each group
    moved = torch.where((weight < 0) & is_group, partner[own], group)
    if beta is not None:  # a reward keeps its beta where the op takes that of another group
        weight = (weight * beta[own] / beta[moved.clamp(0, num_groups - 1)]).to(weight.dtype)
    return _changed(sequences, group=moved, seq_weight=weight)


def _per_sequence(logp: Tensor, sequences: Sequences, family: Family) -> tuple[Tensor, Tensor]:
    """n_s logp and n_s ref_logp [S] float64."""
    reference = torch.zeros_like(logp) if sequences.ref_logp is None else sequences.ref_logp
    if not family.length_normalize:
        return logp.double(), reference.double()
    scale = (1.0 / sequences.length.double()).where(sequences.length > 0, 0.0)
    return weighted(scale, logp.double()), weighted(scale, reference.double())


def _partner(values: Tensor, others: Tensor, sequences: Sequences) -> Tensor:
    """[G], for each group the one whose other value has the rank of its own; groups of weight 0 among themselves."""
    if sequences.group_weight is not None:
        values, others = (x.where(sequences.group_weight != 0, torch.inf) for x in (values, others))
    order, of_others = values.argsort(stable=True), others.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, of_others)


def _by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """[S] -> [G]; the op finds the groups that do not exist."""
    return values.new_zeros(num_groups).index_add(0, group.clamp(0, max(num_groups - 1, 0)), values)


def _changed(sequences: Sequences, **fields: Any) -> Sequences:
    """`_replace`, in a form that the compiler of torch 2.8 follows."""
    return Sequences(*[fields.get(name, value) for name, value in zip(Sequences._fields, sequences, strict=True)])
