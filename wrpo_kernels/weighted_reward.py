"""The losses of Weighted-Reward Preference Optimization under their own names.

    L = -log sigmoid( sum_k alpha_k r(y_ws,k) + (1 - sum_k alpha_k) r(y_wt) - r(y_l) )

One layout for all: K*B source-preferred sequences (all of source 1, then all of source 2, ...), then B
target-preferred, then B rejected. Everything else is the general form of `preference_loss`.

Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_constant, check_number, check_tensor, is_readable
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.layout import HOST, count_sequences, role_by_role
from wrpo_kernels.linear_preference_loss import Lengths, linear_preference_loss
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss


def wrpo_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    alpha: float | Tensor,
    beta: float | Tensor = 0.01,
    num_sources: int = 1,
    gamma: float | Tensor = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    length: Tensor | None = None,
    length_normalize: bool = False,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    backend: str | None = None,
) -> PreferenceOutput:
    """Weighted-reward preference loss from sequence log-probs.

        m_b = sum_k alpha[b, k] * r(source k of b) + (1 - sum_k alpha[b, k]) * r(target of b) - r(rejected of b)
        loss = mean_b -log sigmoid(m_b)                                   r = beta * (logp - ref_logp)

    Args:
        logp: [S] float32, S = (K + 2) * B sequences in the layout above, nats.
        ref_logp: [S] float32, the same under the reference; None is reference-free. Default: None.
        alpha: fusion coefficient in [0, 1]: a number or 0-d tensor, [B] (both split evenly over the sources), or
            [B, K], each source's own weight. 0 is DPO on (target, rejected). Compiled code takes another number at
            every step. Values of a tensor that cannot be read, as preference_loss says, make NaN where they are wrong.
        beta: scale of the implicit reward, a number or [B]. Default: 0.01, the paper's.
        num_sources: K. Default: 1, the paper's.
        gamma, loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, label_smoothing, discopop_tau,
            length, length_normalize, nll_weight, group_weight, reduction, normalizer, empty, backend: as
            preference_loss; a group is an example, G = B. A number as `nll_weight` weighs every response, the rejected
            ones too.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [B]); only `loss` carries a gradient, to `logp`.

    Raises:
        ValueError: S is not a multiple of K + 2, or an option is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics: as preference_loss.
    Memory: a few floats a sequence.
    Source: WRPO, arXiv:2412.03187.
    """
    check_tensor("logp", logp)
    if logp.dim() != 1:
        raise ValueError(f"logp must be [S], got {list(logp.shape)}")
    return preference_loss(
        logp,
        ref_logp,
        **wrpo_layout(logp.shape[0], alpha, num_sources, logp.device),
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        length=length,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
        group_weight=group_weight,
        reduction=reduction,
        normalizer=normalizer,
        empty=empty,
        backend=backend,
    )


def linear_wrpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    alpha: float | Tensor,
    beta: float | Tensor = 0.01,
    num_sources: int = 1,
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
    """`wrpo_loss` from hidden states in one pass; the logits are never stored.

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [S, T, D] float32 | bfloat16 | float16, S = (K + 2) * B sequences in the layout above, or packed [N, D]
            with `cu_seqlens`.
        weight: [V, D] head.
        labels: [S, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        ref_logp: [S] float32, summed reference log-prob of each response, nats; None is reference-free. Default: None.
        alpha, beta, num_sources: as wrpo_loss.
        gamma, loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef, label_smoothing, discopop_tau,
            length_normalize, nll_weight, group_weight, reduction, normalizer, empty: as wrpo_loss.
        bias, adapter, logit_scale, softcap, temperature, ignore_index, shift, cu_seqlens, lengths, num_rows,
            budget_bytes, grad_filter, logits_dtype, backend: as linear_preference_loss.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [B]); only `loss` carries a gradient, to `hidden`, `weight`,
        `bias` and `adapter`.

    Raises:
        ValueError: S is not a multiple of K + 2, or an argument is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics, Memory, Cost: as linear_preference_loss.
    Source: WRPO, arXiv:2412.03187.
    """
    check_tensor("hidden", hidden)
    return linear_preference_loss(
        hidden,
        weight,
        labels,
        ref_logp,
        **wrpo_layout(count_sequences(labels, cu_seqlens), alpha, num_sources, hidden.device, HOST),
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
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


def wrpo_layout(
    num_sequences: int,
    alpha: float | Tensor,
    num_sources: int,
    device: torch.device,
    group_on: torch.device | None = None,
) -> dict[str, Any]:
    """`seq_weight` [S], `group` [S] and `num_groups` of the layout: weights alpha_k, 1 - sum alpha, -1."""
    if isinstance(num_sources, bool) or not isinstance(num_sources, int) or num_sources < 1:
        raise ValueError(f"num_sources must be an int >= 1, got {num_sources!r}")
    roles = num_sources + 2
    if num_sequences % roles:
        raise ValueError(
            f"the number of sequences must be (num_sources + 2) * B = {roles} * B (sources, target, rejected), "
            f"got {num_sequences}"
        )
    examples = num_sequences // roles
    if isinstance(alpha, Tensor):
        weights = _weights_of_examples(alpha, examples, num_sources, device)
    else:
        weights = _weights_of_roles(alpha, num_sources, device)
    return role_by_role(weights, examples, group_on or device)


def _weights_of_roles(alpha: float, num_sources: int, device: torch.device) -> Tensor:
    """[K + 2] float64 of one alpha for all examples."""
    check_number("alpha", alpha, least=0.0)
    if alpha > 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    # alpha meets tensors alone: what Python computes of it would be a constant to torch.compile, which would compile
    # again for each value.
    slope = torch.tensor([1 / num_sources] * num_sources + [-1.0, 0.0], dtype=torch.float64, device="cpu")
    start = torch.tensor([0.0] * num_sources + [1.0, -1.0], dtype=torch.float64, device="cpu")
    return to_device(start + alpha * slope, torch.float64, device)


def _weights_of_examples(alpha: Tensor, examples: int, num_sources: int, device: torch.device) -> Tensor:
    """[K + 2, B] float64 of a tensor of alphas."""
    check_tensor("alpha", alpha)
    if alpha.is_complex() or alpha.dtype == torch.bool:
        raise ValueError(f"alpha must be real numbers in [0, 1], got {alpha.dtype}")
    per_source = _alpha_per_source(to_device(alpha, torch.float64, device), examples, num_sources).t()  # [K, B]
    target = 1.0 - per_source.sum(0, keepdim=True)
    return torch.cat([per_source, target, -torch.ones_like(target)])


def _alpha_per_source(alpha: Tensor, examples: int, num_sources: int) -> Tensor:
    check_constant("alpha", alpha)
    if is_readable(alpha):
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise ValueError(f"alpha must lie in [0, 1], got {alpha.tolist()}")
        if alpha.dim() == 2 and bool((alpha.sum(1) > 1 + 1e-6).any()):
            raise ValueError("alpha [B, K] must sum to at most 1 over the sources of each example")
    else:
        is_share = (alpha >= 0) & (alpha <= 1)
        if alpha.dim() == 2:
            is_share &= alpha.sum(1, keepdim=True) <= 1 + 1e-6
        alpha = alpha.where(is_share, torch.nan)
    if alpha.dim() == 0 or tuple(alpha.shape) == (examples,):
        return (alpha / num_sources).reshape(-1, 1).expand(examples, num_sources)
    if tuple(alpha.shape) == (examples, num_sources):
        return alpha
    raise ValueError(
        f"alpha must be a number, [], [B] = [{examples}] or [B, K] = [{examples}, {num_sources}], "
        f"got {list(alpha.shape)}"
    )
