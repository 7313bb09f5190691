"""Direct Preference Optimization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wrpo_kernels.linear_preference_loss import Lengths, linear_preference_loss
from wrpo_kernels.pairwise.pairs import linear_pair_arguments, pair_arguments
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss


def dpo_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    gamma: float | Tensor = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    length_normalize: bool = False,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    backend: str | None = None,
) -> PreferenceOutput:
    """Direct Preference Optimization of pairs, from sequence log-probs.

        m_b    = r(chosen b) - r(rejected b) - gamma                      r = beta * n * (logp - ref_logp)
        loss_b = -(1 - eps) log sigmoid(m_b) - eps log sigmoid(-m_b)      eps = label_smoothing
        loss   = mean_b (loss_b - nll_weight_b * n * logp(chosen b))      n = 1, or 1 / length with length_normalize

    Args:
        chosen_logp: [B] float32, summed log-prob of each chosen response under the policy, nats.
        rejected_logp: [B] float32, the same of each rejected response.
        ref_chosen_logp, ref_rejected_logp: [B] float32, the same under the reference, summed too; None is
            reference-free. Default: None.
        beta: scale of the implicit reward, > 0, 1/nats; a number or [B]. Default: 0.1.
        gamma: margin by which the chosen reward should lead, in units of reward; a number or [B]. Default: 0, the
            paper's.
        loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, discopop_tau: another loss in the place of
            -log sigmoid, or several: as preference_loss. Default: "sigmoid", the paper's.
        label_smoothing: probability that a preference is flipped, in [0, 0.5). Default: 0.
        chosen_length, rejected_length: [B] int64, numbers of counted tokens; needed by length_normalize, `empty` and
            some losses. Default: none.
        length_normalize: divide each response's log-ratio by its own length. Default: False, the paper's.
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
    Source: DPO, arXiv:2305.18290; label smoothing, the note on conservative DPO that came with its code.
    """
    pairs = pair_arguments(
        chosen_logp,
        rejected_logp,
        ref_chosen_logp=ref_chosen_logp,
        ref_rejected_logp=ref_rejected_logp,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
    )
    return preference_loss(
        **pairs,
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        group_weight=group_weight,
        reduction=reduction,
        normalizer=normalizer,
        empty=empty,
        backend=backend,
    )


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    gamma: float | Tensor = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    length_normalize: bool = False,
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
    """`dpo_loss` from hidden states in one pass; the logits are never stored.

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [2B, T, D] float32 | bfloat16 | float16, B chosen sequences, then B rejected in the same order; or
            packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [2B, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        ref_logp: [2B] float32, summed reference log-prob of each response, nats; None is reference-free. Default: None.
        beta, gamma, loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, label_smoothing, discopop_tau,
            length_normalize, nll_weight, group_weight, reduction, normalizer, empty: as dpo_loss.
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
    Source: DPO, arXiv:2305.18290; label smoothing, the note on conservative DPO that came with its code.
    """
    pairs = linear_pair_arguments(hidden, labels, cu_seqlens, nll_weight)
    return linear_preference_loss(
        hidden,
        weight,
        labels,
        ref_logp,
        **pairs,
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        length_normalize=length_normalize,
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
