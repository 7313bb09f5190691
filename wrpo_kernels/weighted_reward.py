"""The losses of Weighted-Reward Preference Optimization under their own names.

    L = -log sigmoid( sum_k alpha_k r(y_ws,k) + (1 - sum_k alpha_k) r(y_wt) - r(y_l) )

One layout for all: K*B source-preferred sequences (all of source 1, then all of source 2, ...), then B
target-preferred, then B rejected. Everything else is the general form of `preference_loss`.

Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_constant, check_number, check_tensor
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.linear_preference_loss import linear_preference_loss
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss


def wrpo_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    alpha: float | Tensor,
    beta: float = 0.01,
    num_sources: int = 1,
    **options: Any,
) -> PreferenceOutput:
    """Weighted-reward preference loss from sequence log-probs.

        m_b = sum_k alpha[b, k] * r(source k of b) + (1 - sum_k alpha[b, k]) * r(target of b) - r(rejected of b)
        loss = mean_b -log sigmoid(m_b)                                   r = beta * (logp - ref_logp)

    Args:
        logp: [S] float32, S = (K + 2) * B sequences in the layout above, nats.
        ref_logp: [S] float32, the same under the reference; None is reference-free. Default: None.
        alpha: fusion coefficient in [0, 1]: a number or 0-d tensor, [B] (both split evenly over the sources), or
            [B, K], each source's own weight. 0 is DPO on (target, rejected).
        beta: scale of the implicit reward. Default: 0.01, the paper's.
        num_sources: K. Default: 1, the paper's.
        **options: the remaining options of `preference_loss`: gamma, loss_type, label_smoothing, length,
            length_normalize, nll_weight, group_weight, reduction, normalizer, empty, backend.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [B]); only `loss` carries a gradient, to `logp`.

    Raises:
        ValueError: S is not a multiple of K + 2, or an option is wrong; the message names it.

    Source: WRPO, arXiv:2412.03187.
    """
    num_sequences = _length_of("logp", logp, "[S]", 1)
    layout = wrpo_layout(num_sequences, alpha, num_sources, logp.device)
    return preference_loss(logp, ref_logp, beta=beta, **layout, **options)


def linear_wrpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    alpha: float | Tensor,
    beta: float = 0.01,
    num_sources: int = 1,
    **options: Any,
) -> PreferenceOutput:
    """`wrpo_loss` from hidden states in one pass; the logits are never stored.

    Args:
        hidden: [S, T, D], S = (K + 2) * B sequences in the layout above, or packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [S, T] int64 (or [N]); labels[s, t] is predicted from hidden[s, t]; `ignore_index` (-100) elsewhere.
        ref_logp: [S] float32, reference log-prob of each response; None is reference-free. Default: None.
        alpha, beta, num_sources: as `wrpo_loss`.
        **options: the remaining options of `linear_preference_loss`: those of the loss, of the head (bias, adapter,
            logit_scale, softcap, temperature), ignore_index, cu_seqlens, num_rows, budget_bytes, grad_filter, backend.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [B]); only `loss` carries a gradient, to `hidden`, `weight`,
        `bias` and `adapter`.

    Raises:
        ValueError: S is not a multiple of K + 2, or an argument is wrong; the message names it.

    Source: WRPO, arXiv:2412.03187.
    """
    check_tensor("hidden", hidden)
    if (cu_seqlens := options.get("cu_seqlens")) is None:
        num_sequences = _length_of("labels", labels, "[S, T]", 2)
    else:
        num_sequences = _length_of("cu_seqlens", cu_seqlens, "[S+1]", 1) - 1
    layout = wrpo_layout(num_sequences, alpha, num_sources, hidden.device)
    return linear_preference_loss(hidden, weight, labels, ref_logp, beta=beta, **layout, **options)


def _length_of(name: str, value: Tensor, letters: str, dims: int) -> int:
    check_tensor(name, value)
    if value.dim() != dims or (letters == "[S+1]" and not len(value)):
        raise ValueError(f"{name} must be {letters}, got {list(value.shape)}")
    return value.shape[0]


def wrpo_layout(num_sequences: int, alpha: float | Tensor, num_sources: int, device: torch.device) -> dict:
    """`seq_weight` [S], `group` [S] and `num_groups` of the layout: weights alpha_k, 1 - sum alpha, -1."""
    if isinstance(num_sources, bool) or not isinstance(num_sources, int) or num_sources < 1:
        raise ValueError(f"num_sources must be an int >= 1, got {num_sources!r}")
    examples, rest = divmod(num_sequences, num_sources + 2)
    if rest:
        raise ValueError(
            f"the number of sequences must be (num_sources + 2) * B = {num_sources + 2} * B "
            f"(sources, target, rejected), got {num_sequences}"
        )
    group = torch.arange(examples, device=device).repeat(num_sources + 2)
    seq_weight = _seq_weight(alpha, examples, num_sources, device)
    return {"seq_weight": seq_weight, "group": group, "num_groups": examples}


def _seq_weight(alpha: float | Tensor, examples: int, num_sources: int, device: torch.device) -> Tensor:
    if not isinstance(alpha, Tensor):
        check_number("alpha", alpha, least=0.0)
        if alpha > 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        weights = [alpha / num_sources] * (num_sources * examples) + [1.0 - alpha] * examples + [-1.0] * examples
        return to_device(weights, torch.float64, device)
    check_tensor("alpha", alpha)
    if alpha.is_complex() or alpha.dtype == torch.bool:
        raise ValueError(f"alpha must be real numbers in [0, 1], got {alpha.dtype}")
    per_source = _alpha_per_source(to_device(alpha, torch.float64, device), examples, num_sources)  # [B, K]
    target = 1.0 - per_source.sum(1)
    return torch.cat([per_source.t().reshape(-1), target, -torch.ones_like(target)])


def _alpha_per_source(alpha: Tensor, examples: int, num_sources: int) -> Tensor:
    check_constant("alpha", alpha)
    if alpha.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading it would wait
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise ValueError(f"alpha must lie in [0, 1], got {alpha.tolist()}")
        if alpha.dim() == 2 and bool((alpha.sum(1) > 1 + 1e-6).any()):
            raise ValueError("alpha [B, K] must sum to at most 1 over the sources of each example")
    if alpha.dim() == 0 or tuple(alpha.shape) == (examples,):
        return (alpha / num_sources).reshape(-1, 1).expand(examples, num_sources)
    if tuple(alpha.shape) == (examples, num_sources):
        return alpha
    raise ValueError(
        f"alpha must be a number, [], [B] = [{examples}] or [B, K] = [{examples}, {num_sources}], "
        f"got {list(alpha.shape)}"
    )
