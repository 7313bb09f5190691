"""Simple Preference Optimization."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.linear_preference_loss import Lengths, linear_preference_loss
from wrpo_kernels.pairwise.pairs import linear_pair_arguments, pair_arguments
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss


def simpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float | Tensor = 2.0,
    gamma: float | Tensor = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    backend: str | None = None,
) -> PreferenceOutput:
    """Simple Preference Optimization (SimPO) of pairs, without a reference, from sequence log-probs.

        m_b    = r(chosen b) - r(rejected b) - gamma                      r = beta * logp / length
        loss_b = -(1 - eps) log sigmoid(m_b) - eps log sigmoid(-m_b)      eps = label_smoothing
        loss   = mean_b (loss_b - nll_weight_b * logp(chosen b) / length(chosen b))

    gamma is in units of reward, as in the paper and as TRL's `simpo_gamma`; the paper's code has gamma_beta_ratio,
    which is gamma / beta. TRL's CPOTrainer adds a likelihood term unless `cpo_alpha=0`: here that is `nll_weight`.

    Args:
        chosen_logp: [B] float32, summed (not averaged) log-prob of each chosen response under the policy, nats.
        rejected_logp: [B] float32, the same of each rejected response.
        chosen_length: [B] int64, number of counted tokens of each chosen response.
        rejected_length: [B] int64, the same of each rejected response.
        beta: scale of the reward, > 0, 1/nats. Default: 2, as in the paper's code.
        gamma: margin by which the chosen reward should lead, in units of reward. Default: 0.5, as in the paper's code.
        label_smoothing: probability that a preference is flipped, in [0, 0.5). Default: 0.
        nll_weight: number >= 0 or [B] float32, weight of the chosen response's negative log-likelihood. Default: 0.
        group_weight, reduction, normalizer, empty, backend: as preference_loss; a group is a pair, G = B.

    Returns:
        PreferenceOutput(loss, logp [2B], reward [2B], margin [B]), B chosen, then B rejected; only `loss` carries a
        gradient, to `chosen_logp` and `rejected_logp`.

    Raises:
        ValueError: tensors of different shapes, or an argument is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics: as preference_loss.
    Memory: a few floats a sequence.
    Source: SimPO, arXiv:2405.14734.
    """
    pairs = pair_arguments(
        chosen_logp,
        rejected_logp,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        length_normalize=True,
        nll_weight=nll_weight,
    )
    return preference_loss(
        **pairs,
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
        group_weight=group_weight,
        reduction=reduction,
        normalizer=normalizer,
        empty=empty,
        backend=backend,
    )


def linear_simpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    beta: float | Tensor = 2.0,
    gamma: float | Tensor = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool | int = False,
    cu_seqlens: Tensor | None = None,
    lengths: Lengths | None = None,
    num_rows: int | None = None,
    budget_bytes: int | None = None,
    grad_filter: float | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> PreferenceOutput:
    """`simpo_loss` from hidden states in one pass; the logits are never stored.

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [2B, T, D] float32 | bfloat16 | float16, B chosen sequences, then B rejected in the same order; or
            packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [2B, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        beta, gamma, label_smoothing, nll_weight, group_weight, reduction, normalizer, empty: as simpo_loss.
        bias, adapter, logit_scale, softcap, temperature, ignore_index, shift, cu_seqlens, lengths, num_rows,
            budget_bytes, grad_filter, logits_dtype, backend: as linear_preference_loss.

    Returns:
        PreferenceOutput(loss, logp [2B], reward [2B], margin [B]), B chosen, then B rejected; only `loss` carries a
        gradient, to `hidden`, `weight`, `bias` and `adapter`.

    Raises:
        ValueError: an odd number of sequences, or an argument is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics, Memory, Cost: as linear_preference_loss.
    Source: SimPO, arXiv:2405.14734.
    """
    pairs = linear_pair_arguments(hidden, labels, cu_seqlens, nll_weight)
    return linear_preference_loss(
        hidden,
        weight,
        labels,
        **pairs,
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
        length_normalize=True,
        group_weight=group_weight,
        reduction=reduction,
        normalizer=normalizer,
        empty=empty,
        bias=bias,
        adapter=adapter,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        shift=shift,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        num_rows=num_rows,
        budget_bytes=budget_bytes,
        grad_filter=grad_filter,
        logits_dtype=logits_dtype,
        backend=backend,
    )
