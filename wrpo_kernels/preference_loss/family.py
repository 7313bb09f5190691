"""What a preference loss is told: which loss of the family it is, and what it knows of each sequence and group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wrpo_kernels.checks import check_number

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


class Sequences(NamedTuple):
    """S sequences in G groups; the log-probs themselves come apart from it."""

    ref_logp: Tensor | None  # [S]
    seq_weight: Tensor  # [S]
    group: Tensor  # [S] int64
    length: Tensor | None  # [S] int64, counted rows
    nll_weight: Tensor | None  # [S]
    group_weight: Tensor | None  # [G]

    def weighing(self, seq_weight: Tensor, nll_weight: Tensor | None, group_weight: Tensor | None) -> Sequences:
        """The same with other weights; `_replace` is what the compiler of torch 2.8 does not follow."""
        return Sequences(self.ref_logp, seq_weight, self.group, self.length, nll_weight, group_weight)

    def at(self, positions: Tensor, groups: Tensor, group: Tensor) -> Sequences:
        """Those at `positions`, which make up whole `groups`; `group` are the numbers of theirs among these."""
        weight = None if self.group_weight is None else self.group_weight[groups]
        chosen = [None if x is None else x[positions] for x in self._replace(group_weight=None)]
        return Sequences(*chosen)._replace(group=group, group_weight=weight)

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
    length_normalize: bool

    @property
    def scalars(self) -> tuple[float, float, int, float, bool]:
        """As the compiled kernels take them."""
        kind = LOSS_TYPES.index(self.loss_type)
        return self.beta, self.gamma, kind, self.label_smoothing, self.length_normalize


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
    check_number("label_smoothing", family.label_smoothing, least=0.0)
    if family.label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {family.label_smoothing}")
    if family.label_smoothing and family.loss_type != "sigmoid":
        raise ValueError(
            f"label_smoothing belongs to loss_type 'sigmoid', got {family.label_smoothing} with {family.loss_type!r}"
        )
