"""The family of preference losses, from sequence log-probs: any number of weighted responses in one margin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from wrpo_kernels.checks import (
    LARGEST_FLOAT32,
    check_backend_name,
    check_bool,
    check_constant,
    check_device,
    check_int,
    check_int64,
    check_number,
    check_tensor,
    is_readable,
)
from wrpo_kernels.preference_loss import contract
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences

MOST_GROUPS = 1 << 31


class PreferenceOutput(NamedTuple):
    """What every preference loss returns; only `loss` carries a gradient.

    From sequence log-probs, `logp` is the argument itself, detached: it shares its memory.
    """

    loss: Tensor  # [] float32, or [G] with reduction="none"
    logp: Tensor  # [S] float32, sequence log-probs, nats
    reward: Tensor  # [S] float32, implicit rewards r_s
    margin: Tensor  # [G] float32, margins m_g


def preference_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    seq_weight: Tensor,
    group: Tensor,
    beta: float,
    gamma: float = 0.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    length: Tensor | None = None,
    length_normalize: bool = False,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    num_groups: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    backend: str | None = None,
) -> PreferenceOutput:
    """Preference loss of groups of weighted responses, from their sequence log-probs.

        r_s = beta * n_s * (logp[s] - ref_logp[s])            n_s = 1, or 1 / length[s] with length_normalize
        m_g = sum_{s in g} seq_weight[s] * r_s - gamma
        loss_g = group_weight[g] * phi(m_g) - sum_{s in g} nll_weight[s] * n_s * logp[s]

        phi(m) = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)      "sigmoid", eps = label_smoothing
               = max(0, 1 - m)                                        "hinge"
               = ((m - 1/2) / beta)^2                                 "ipo", beta is the paper's tau

    WRPO is the weights [alpha, 1 - alpha, -1], DPO [1, -1]; several sources or several rejected responses are
    several weights.

    Args:
        logp: [S] float32, summed log-prob of each response under the policy, nats. The only input with a gradient.
        ref_logp: [S] float32, the same under the reference, summed too; None is reference-free. Default: None.
        seq_weight: [S] float32, weight of each response in its group's margin.
        group: [S] int64 in [0, G), the example that each response belongs to, in any order; every group has one at
            least. `group.unique(return_inverse=True)[1]` numbers ids that have gaps.
        beta: scale of the implicit reward, > 0.
        gamma: target margin, in units of reward. Default: 0.
        loss_type: "sigmoid", "hinge" or "ipo". Default: "sigmoid".
        label_smoothing: probability that a preference is flipped, in [0, 0.5). Default: 0.
        length: [S] int64, number of counted tokens; needed by length_normalize and by empty="zero". Default: none.
        length_normalize: divide each response's log-ratio by its own length. Default: False.
        nll_weight: number >= 0, or [S] float32 of either sign, weight of each response's negative log-likelihood.
            Default: 0.
        group_weight: [G] float32, weight of each example's margin loss; 0 switches it off whatever the margin, and
            leaves the example's NLL to `nll_weight`. Default: 1.
        num_groups: G; None reads it from `group`, which waits for the device on an accelerator, and which
            torch.compile cannot do in one graph. Default: None.
        reduction: "mean" over groups, "sum", or "none" for [G]. Default: "mean".
        normalizer: number or 0-d tensor that replaces G under "mean", so that micro-batches of uneven size add up
            exactly: pass the number of examples of the whole batch. Default: G.
        empty: what a response of length 0 means: "raise" (ValueError), or "zero": its whole group counts nothing and
            leaves the mean. Default: "raise".
        backend: "native", "cuda", "triton" or "reference". Default: the first that can.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [G]), float32; all but `loss` detached.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

        On an accelerator and in compiled code nobody looks at values first: an empty response under empty="raise", a
        negative length, a group that does not exist or has no sequence, and a `normalizer` that is not > 0 raise there
        only if an op meets them on the CPU. Else they make NaN of the loss of their group, or of all groups, and of its
        gradient; never a number.

    Compiled: `nll_weight`, `normalizer` and `num_groups` may change from call to call; beta and the other numbers are
        constants of the graph, so that each new value compiles again.
    Numerics: sums and exponentials in float64 in a fixed order, results rounded once to float32.
    Memory: a few floats a sequence.
    Source: WRPO, arXiv:2412.03187; DPO 2305.18290; IPO 2310.12036; SimPO 2405.14734; hinge, SLiC-HF 2305.10425.
    """
    contract.check_logp(logp)
    check_backend_name(backend)
    loss, counted = loss_arguments(
        logp,
        logp.dtype,
        ref_logp=ref_logp,
        seq_weight=seq_weight,
        group=group,
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        length=length,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
        group_weight=group_weight,
        num_groups=num_groups,
        empty=empty,
    )
    return loss_of_sequences(logp, loss, counted, reduction, normalizer, backend)


def loss_arguments(
    like: Tensor,
    dtype: torch.dtype,
    *,
    ref_logp: Tensor | None,
    seq_weight: Tensor,
    group: Tensor,
    beta: float,
    gamma: float,
    loss_type: str,
    label_smoothing: float,
    length: Tensor | None,
    lengths: Tensor | None = None,
    length_normalize: bool,
    nll_weight: float | Tensor,
    group_weight: Tensor | None,
    num_groups: int | None,
    empty: str,
) -> tuple[LossArguments, int | Tensor]:
    """The checked arguments of the op after `logp`, and the number of groups that count.

    `like` [S] has the shape and the device of the log-probs, `dtype` is theirs; `lengths` [S] are those of `length` on
    the CPU, where the caller knows them.
    """
    check_bool("length_normalize", length_normalize)
    num_groups = count_groups(group, num_groups)
    nll_weight = spread_nll_weight(nll_weight, like, dtype)
    sequences = Sequences(ref_logp, seq_weight, group, length, nll_weight, group_weight)
    loss = LossArguments(sequences, num_groups, Family(beta, gamma, loss_type, label_smoothing, length_normalize))
    contract.check(like, loss)
    return checked_lengths(empty, loss, dtype, length if lengths is None else lengths)


def loss_of_sequences(
    logp: Tensor,
    loss: LossArguments,
    counted: int | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
) -> PreferenceOutput:
    values, reward, margin, _ = contract.preference_loss(logp, *loss, backend)
    return PreferenceOutput(reduce_loss(values, reduction, normalizer, counted), logp.detach(), reward, margin)


def count_groups(group: Tensor, num_groups: int | None) -> int:
    if num_groups is None:
        check_tensor("group", group)
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


def spread_nll_weight(nll_weight: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if isinstance(nll_weight, Tensor):
        return nll_weight
    check_number("nll_weight", nll_weight, least=0.0, most=LARGEST_FLOAT32)
    # A product, since a number that fills a tensor would be a constant to torch.compile.
    return torch.ones_like(like, dtype=dtype, requires_grad=False) * nll_weight if nll_weight else None


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


def _checked_normalizer(normalizer: Tensor, loss: Tensor) -> Tensor:
    """[] in a type that leaves the loss its own; the value is read where that does not wait for a device."""
    check_tensor("normalizer", normalizer)
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got {list(normalizer.shape)}")
    if normalizer.device.type != "cpu":
        check_device("normalizer", normalizer, "the loss", loss.device)
    check_constant("normalizer", normalizer)
    normalizer = normalizer.reshape(())
    if is_readable(normalizer):
        check_number("normalizer", normalizer.item(), above=0.0)
        return normalizer
    return normalizer.to(loss.dtype).where((normalizer > 0) & normalizer.isfinite(), torch.nan)


def reduce_loss(loss: Tensor, reduction: str, normalizer: float | Tensor | None, counted: int | Tensor) -> Tensor:
    """[G], or their sum [], -> the scalar that `reduction` and `normalizer` name."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer belongs to reduction='mean', got reduction={reduction!r}")
        if isinstance(normalizer, Tensor):
            normalizer = _checked_normalizer(normalizer, loss)
        else:
            check_number("normalizer", normalizer, above=0.0)
            normalizer = float(normalizer)
    if reduction == "none":
        return loss
    total = loss.sum() if loss.dim() else loss
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = counted if isinstance(counted, Tensor) else max(counted, 1)
    return total / (normalizer.to(total.dtype) if isinstance(normalizer, Tensor) else normalizer)
