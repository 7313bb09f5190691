"""The arguments of a preference loss after its log-probs: checked, numbers spread over sequences, empty ones out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from wrpo_kernels.checks import (
    LARGEST_FLOAT32,
    as_float,
    check_bool,
    check_float,
    check_int,
    check_int64,
    check_number,
    check_tensor,
    check_vector,
    is_readable,
)
from wrpo_kernels.preference_loss import contract
from wrpo_kernels.preference_loss.catalogue import Mixture, check_mixture, family_or_mixture
from wrpo_kernels.preference_loss.divergence import Divergence
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences
from wrpo_kernels.remembered import remembered

MOST_GROUPS = 1 << 31


def loss_arguments(
    like: Tensor,
    dtype: torch.dtype,
    *,
    ref_logp: Tensor | None,
    seq_weight: Tensor,
    group: Tensor,
    beta: float | Tensor,
    gamma: float | Tensor,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    label_smoothing: float,
    discopop_tau: float,
    length: Tensor | None,
    lengths: Tensor | None = None,
    length_normalize: bool,
    nll_weight: float | Tensor,
    group_weight: Tensor | None,
    num_groups: int | None,
    empty: str,
) -> tuple[LossArguments, Mixture | None, int | Tensor]:
    """The checked arguments of the op after `logp`, the mixture if it is one, and the number of groups that count.

    `like` [S] has the shape and the device of the log-probs, `dtype` is theirs; `lengths` [S] are those of `length` on
    the CPU, where the caller knows them.
    """
    num_groups = count_groups(group, num_groups)
    beta, group_beta = _of_all_or_of_each("beta", beta, 1.0, above=0.0)
    gamma, group_gamma = _of_all_or_of_each("gamma", gamma, 0.0)
    nll_of_each, nll_of_all = (nll_weight, 0.0) if isinstance(nll_weight, Tensor) else (None, nll_weight)
    sequences = Sequences(ref_logp, seq_weight, group, length, nll_of_each, group_weight, group_beta, group_gamma)
    family, mixture = _checked_family(
        like,
        num_groups,
        nll_of_all,
        beta,
        gamma,
        loss_type,
        loss_weights,
        f_divergence_type,
        f_alpha_divergence_coef,
        label_smoothing,
        discopop_tau,
        length_normalize,
        *sequences,
    )
    if nll_of_all:
        sequences = sequences.weighing(seq_weight, _filled_like(like, dtype, nll_of_all), group_weight)
    loss = LossArguments(sequences, num_groups, family)
    loss, counted = checked_lengths(empty, loss, dtype, length if lengths is None else lengths)
    return loss, mixture, counted


@remembered
def _checked_family(
    like: Tensor,
    num_groups: int,
    nll_of_all: float,
    beta: float,
    gamma: float,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    label_smoothing: float,
    discopop_tau: float,
    length_normalize: bool,
    *of_sequences: Any,
) -> tuple[Family, Mixture | None]:
    """The loss, after all checks that read no value of a tensor.

    By position, for `remembered` lets calls with names and with containers pass by. `of_sequences` are the fields of
    `Sequences` in its own order: among tensors of one type nothing else would notice two that changed places.
    """
    check_bool("length_normalize", length_normalize)
    check_number("nll_weight", nll_of_all, least=0.0, most=LARGEST_FLOAT32)
    divergence = Divergence(f_divergence_type, f_alpha_divergence_coef)
    name, mixture = family_or_mixture(loss_type, loss_weights, divergence)
    family = Family(beta, gamma, name, label_smoothing, discopop_tau, length_normalize)
    loss = LossArguments(Sequences(*of_sequences), num_groups, family)
    contract.check(like, loss)
    if mixture is not None:
        check_mixture(mixture, loss)
    return family, mixture


def count_groups(group: Tensor, num_groups: int | None) -> int:
    if num_groups is None:
        check_vector("group", group, "[S]")
        check_int64("group", group)
        if is_compiling():
            raise ValueError("num_groups must be given: torch.compile cannot read the number of groups from `group`")
        numbers = group.tolist()
        num_groups = max(numbers, default=-1) + 1
        contract.check_group_numbers(numbers, num_groups)
        return num_groups
    if not is_compiling():
        check_int("num_groups", num_groups)
        if not 0 <= num_groups <= MOST_GROUPS:
            raise ValueError(f"num_groups must be in [0, 2^31], got {num_groups}")
    return num_groups


def _of_all_or_of_each(
    name: str, value: float | Tensor, unused: float, above: float = -math.inf
) -> tuple[float, Tensor | None]:
    """A number of all groups, or [G] of each, whose values are read where that does not wait for a device."""
    if not isinstance(value, Tensor):
        return value, None
    check_tensor(name, value)
    check_float(name, value)
    is_right = value.isfinite() & (value > above)
    if not is_readable(value):
        return unused, value.where(is_right, torch.nan)
    if not is_right.all():
        wrong = value[~is_right].flatten()[0].item()
        raise ValueError(f"{name} must be finite{' and > 0' if above == 0 else ''} in every group, got {wrong}")
    return unused, value


def _filled_like(like: Tensor, dtype: torch.dtype, number: float) -> Tensor:
    # A product, since a number that fills a tensor would be a constant to torch.compile.
    return torch.ones_like(like, dtype=dtype, requires_grad=False) * as_float(number)


def checked_lengths(
    empty: str, loss: LossArguments, dtype: torch.dtype, lengths: Tensor | None
) -> tuple[LossArguments, int | Tensor]:
    """The arguments after `empty`, and the number of groups that count: "zero" gives weight 0 to the groups that hold
    an empty response. `lengths` [S] are those of `loss` wherever they can best be read; where they cannot, a wrong one
    makes NaN of its group."""
    if empty not in ("raise", "zero"):
        raise ValueError(f"empty must be 'raise' or 'zero', got {empty!r}")
    sequences, num_groups, family = loss
    if lengths is None:
        if empty == "zero":
            raise ValueError("empty='zero' needs the lengths, numbers of counted tokens [S], to know what is empty")
        return loss, num_groups
    if is_readable(lengths):
        check_lengths(lengths.tolist(), empty)
    if empty == "zero" and not (lengths is not sequences.length and is_readable(lengths) and lengths.all()):
        return _without_empty(loss, dtype)
    if is_readable(lengths):
        return loss, num_groups
    weight = sequences.seq_weight.where(sequences.length > 0, torch.nan)
    sequences = sequences.weighing(weight, sequences.nll_weight, sequences.group_weight)
    return LossArguments(sequences, num_groups, family), num_groups


def _without_empty(loss: LossArguments, dtype: torch.dtype) -> tuple[LossArguments, Tensor]:
    sequences, num_groups, family = loss
    contract.check_groups(sequences.group, num_groups)
    group = sequences.group.clamp(0, num_groups - 1)  # on an accelerator the kernel makes NaN of what is out of range
    worst = torch.ones(num_groups, dtype=dtype, device=group.device)
    worst = worst.scatter_reduce(0, group, sequences.length.sign().to(dtype), "amin")  # 0 where any response is empty
    full = worst.where(worst >= 0, torch.nan)
    weight = full if sequences.group_weight is None else sequences.group_weight * full
    nll_weight = None if sequences.nll_weight is None else sequences.nll_weight * full[group]
    kept = sequences.weighing(sequences.seq_weight, nll_weight, weight)
    return LossArguments(kept, num_groups, family), full.sum().clamp(min=1)


def check_lengths(lengths: list[int], empty: str) -> None:
    shortest = min(lengths, default=1)
    if shortest < 0:
        raise ValueError(f"length must be >= 0, got {shortest}")
    if shortest == 0 and empty == "raise":
        sequence = lengths.index(0)
        raise ValueError(
            f"sequence {sequence} has no counted token, so its log-prob means nothing; drop its example, give it a "
            "longer max_length, or pass empty='zero' to switch such examples off"
        )
