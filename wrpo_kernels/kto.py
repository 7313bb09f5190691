"""Kahneman-Tversky Optimization: responses that are good or bad by themselves, without a partner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    LARGEST_FLOAT32,
    as_float,
    check_constant,
    check_device,
    check_number,
    check_shape,
    check_tensor,
    check_vector,
    is_readable,
)
from wrpo_kernels.layout import count_sequences
from wrpo_kernels.linear_preference_loss import linear_preference_loss
from wrpo_kernels.linear_preference_loss.lengths import Lengths
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    is_desirable: Tensor,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> PreferenceOutput:
    """Kahneman-Tversky Optimization (KTO) of single responses, from sequence log-probs.

        r_s    = beta * (logp[s] - ref_logp[s])                z = beta * kl
        loss_s = desirable_weight   * (1 - sigmoid(r_s - z))   of a desirable response
               = undesirable_weight * (1 - sigmoid(z - r_s))   of another
        loss   = mean_s loss_s

    Args:
        logp: [S] float32, summed log-prob of each response under the policy, nats.
        ref_logp: [S] float32, the same under the reference; None is reference-free. Default: None.
        is_desirable: [S] bool.
        kl: how far the policy is from the reference, >= 0, nats, a number or []: the mean of logp - ref_logp over
            prompts with the answers of others, clamped at 0, over all ranks. A constant. Default: 0.
        beta: scale of the implicit reward, > 0, 1/nats. Default: 0.1.
        desirable_weight, undesirable_weight: >= 0, for data that has more of one. Default: 1.
        reduction, normalizer, backend: as preference_loss; a group is a response, G = S.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [S]), margin r_s - z or z - r_s; only `loss` carries a
        gradient, to `logp`.

    Raises:
        ValueError: a shape, dtype or number is wrong; the message names it. A `kl` that cannot be read, as
            preference_loss says, makes NaN where it is wrong.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics: as preference_loss.
    Memory: a few floats a sequence.
    Source: KTO, arXiv:2402.01306.
    """
    check_vector("logp", logp, "[S]")
    layout = kto_layout(len(logp), is_desirable, kl, beta, desirable_weight, undesirable_weight, logp.device)
    return preference_loss(logp, ref_logp, **layout, reduction=reduction, normalizer=normalizer, backend=backend)


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    is_desirable: Tensor,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
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
    """`kto_loss` from hidden states in one pass; the logits are never stored.

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [S, T, D] float32 | bfloat16 | float16, or packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [S, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        ref_logp: [S] float32, summed reference log-prob of each response, nats; None is reference-free. Default: None.
        is_desirable, kl, beta, desirable_weight, undesirable_weight: as kto_loss.
        reduction, normalizer, empty, bias, adapter, logit_scale, softcap, temperature, ignore_index, shift,
            cu_seqlens, lengths, num_rows, budget_bytes, grad_filter, logits_dtype, backend: as linear_preference_loss.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [S]); only `loss` carries a gradient, to `hidden`, `weight`,
        `bias` and `adapter`.

    Raises:
        ValueError: an argument is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics, Memory, Cost: as linear_preference_loss.
    Source: KTO, arXiv:2402.01306.
    """
    check_tensor("hidden", hidden)
    number = count_sequences(labels, cu_seqlens)
    layout = kto_layout(number, is_desirable, kl, beta, desirable_weight, undesirable_weight, hidden.device)
    return linear_preference_loss(
        hidden,
        weight,
        labels,
        ref_logp,
        **layout,
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


def kto_layout(
    number: int,
    is_desirable: Tensor,
    kl: float | Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    device: torch.device,
) -> dict[str, Any]:
    """Responses of a group each as arguments of `preference_loss`: the reference point stands in the group's gamma."""
    check_tensor("is_desirable", is_desirable)
    check_shape("is_desirable", is_desirable, "[S]", number)
    check_device("is_desirable", is_desirable, "the responses", device)
    if is_desirable.dtype != torch.bool:
        raise ValueError(f"is_desirable must be bool, got {is_desirable.dtype}")
    check_number("beta", beta, above=0.0)
    check_number("desirable_weight", desirable_weight, least=0.0, most=LARGEST_FLOAT32)
    check_number("undesirable_weight", undesirable_weight, least=0.0, most=LARGEST_FLOAT32)
    sign = is_desirable.float() * 2 - 1
    return {
        "loss_type": "kto",
        "beta": beta,
        "gamma": sign * (as_float(beta) * _checked_kl(kl)),
        "seq_weight": sign,
        "group": torch.arange(number, device=device),
        "num_groups": number,
        "group_weight": torch.where(is_desirable, as_float(desirable_weight), as_float(undesirable_weight)).float(),
    }


def _checked_kl(kl: float | Tensor) -> float | Tensor:
    if not isinstance(kl, Tensor):
        check_number("kl", kl, least=0.0)
        return kl
    check_shape("kl", kl, "[]")
    check_constant("kl", kl)
    if is_readable(kl):
        check_number("kl", kl.item(), least=0.0)
        return kl
    return kl.where((kl >= 0) & kl.isfinite(), torch.nan)
