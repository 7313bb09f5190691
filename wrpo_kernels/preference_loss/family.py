"""What a preference loss is told: which loss of the family it is, and what it knows of each sequence and group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from wrpo_kernels.checks import check_number

KERNELS = ("sigmoid", "hinge", "ipo", "exo_pair", "discopop", "kto")  # losses of a margin, as csrc/ numbers them
LOSS_TYPES = (*KERNELS, "robust")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "sigmoid_norm", "aot", "aot_unpaired")


class Sequences(NamedTuple):
    """S sequences in G groups; the log-probs themselves come apart from it."""

    ref_logp: Tensor | None  # [S]
    seq_weight: Tensor  # [S]
    group: Tensor  # [S] int64
    length: Tensor | None  # [S] int64, counted rows
    nll_weight: Tensor | None  # [S]
    group_weight: Tensor | None  # [G]
    group_beta: Tensor | None = None  # [G]
    group_gamma: Tensor | None = None  # [G]

    def weighing(self, seq_weight: Tensor, nll_weight: Tensor | None, group_weight: Tensor | None) -> Sequences:
        """The same with other weights; `_replace` is what the compiler of torch 2.8 does not follow."""
        weights = (nll_weight, group_weight)
        return Sequences(
            self.ref_logp, seq_weight, self.group, self.length, *weights, self.group_beta, self.group_gamma
        )

    def at(self, positions: Tensor, groups: Tensor, group: Tensor) -> Sequences:
        """Those at `positions`, which make up whole `groups`; `group` are the numbers of theirs among these."""
        *of_sequences, weight, beta, gamma = self
        chosen = [None if x is None else x[positions] for x in of_sequences]
        of_groups = [None if x is None else x[groups] for x in (weight, beta, gamma)]
        return Sequences(*chosen, *of_groups)._replace(group=group)

    def margin_share(self, family: Family) -> Tensor:
        """w_s n_s [S]: without a likelihood term, d loss / d logp of a group's sequences is a multiple of it."""
        return self._scaled_by_length(self.seq_weight, family)

    def likelihood_share(self, family: Family) -> Tensor:
        """-nll_s n_s [S]: without a margin d loss / d logp itself."""
        nll = self.seq_weight * 0.0 if self.nll_weight is None else self.nll_weight
        return -self._scaled_by_length(nll, family)

    def _scaled_by_length(self, weight: Tensor, family: Family) -> Tensor:
        if not family.length_normalize:
            return weight
        return (weight / self.length).where(self.length > 0, 0.0)


class Family(NamedTuple):
    """Which loss; none of it is a tensor."""

    beta: float
    gamma: float
    loss_type: str
    label_smoothing: float
    discopop_tau: float
    length_normalize: bool

    @property
    def kernel(self) -> int:
        """The number of the kernels' loss: "robust" is "sigmoid" of another shape."""
        return KERNELS.index("sigmoid" if self.loss_type == "robust" else self.loss_type)

    @property
    def shape(self) -> float:
        """The one number that bends the loss.

        "robust": ((1 - eps) softplus(-m) - eps softplus(m)) / (1 - 2 eps) = softplus(-m) - eps / (1 - 2 eps) m.
        """
        if self.loss_type == "discopop":
            return self.discopop_tau
        eps = self.label_smoothing
        return -eps / (1 - 2 * eps) if self.loss_type == "robust" else eps

    @property
    def scalars(self) -> tuple[float, float, int, float, bool]:
        """As the compiled kernels take them."""
        return self.beta, self.gamma, self.kernel, self.shape, self.length_normalize


class LossArguments(NamedTuple):
    """All that the op takes beside the log-probs."""

    sequences: Sequences
    num_groups: int
    family: Family


def check_family(family: Family) -> None:
    check_number("beta", family.beta, above=0.0)
    check_number("gamma", family.gamma)
    if family.loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {list(LOSS_TYPES)}, got {family.loss_type!r}")
    check_smoothing(family.label_smoothing, (family.loss_type,))
    check_number("discopop_tau", family.discopop_tau, above=0.0)


def check_smoothing(eps: float, loss_types: Sequence[str]) -> None:
    check_number("label_smoothing", eps, least=0.0)
    if eps >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {eps}")
    if eps and not any(name in SMOOTHED for name in loss_types):
        raise ValueError(f"label_smoothing belongs to {', '.join(SMOOTHED)}, got {eps} with {', '.join(loss_types)!r}")
    if "exo_pair" in loss_types and not eps:
        raise ValueError("label_smoothing must be > 0 for loss_type 'exo_pair', got 0; its paper takes 0.001")
