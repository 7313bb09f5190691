"""The likelihood of responses: supervised fine-tuning from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    check_backend_name,
    check_constant,
    check_device,
    check_float,
    check_shape,
    check_tensor,
)
from wrpo_kernels.dispatch.backends import check_name
from wrpo_kernels.layout import HOST, count_sequences
from wrpo_kernels.linear_preference_loss import (
    Lengths,
    check_sequences,
    likelihood_in_one_pass,
    sequence_logp,
    takes_one_pass,
)
from wrpo_kernels.linear_preference_loss.contract import CANDIDATES
from wrpo_kernels.linear_preference_loss.lengths import Counts
from wrpo_kernels.lm_head.inputs import checked_options, checked_tensors
from wrpo_kernels.lm_head.labels import with_shifted_labels
from wrpo_kernels.preference_loss.reduction import reduce_loss
from wrpo_kernels.token_logp.contract import logp_dtype


class LikelihoodOutput(NamedTuple):
    """What `linear_nll_loss` returns; only `loss` carries a gradient."""

    loss: Tensor  # [] float32
    logp: Tensor  # [S] float32, sequence log-probs, nats


def linear_nll_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    seq_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
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
) -> LikelihoodOutput:
    """Negative log-likelihood of responses from hidden states, the loss of supervised fine-tuning; the logits are never
    stored.

        logp[s] = sum_t log softmax(z[s, t])[labels[s, t]]            over the labels that count; z as linear_token_logp
        loss    = -sum_s seq_weight[s] * logp[s] / normalizer

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [S, T, D] float32 | bfloat16 | float16, or packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [S, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        seq_weight: [S] float32, what each response weighs; 0 leaves one out. Default: 1.
        normalizer: number or 0-d tensor > 0. Default: the number of labels that count, for a mean over tokens.
        bias, adapter, logit_scale, softcap, temperature, ignore_index, shift, cu_seqlens, lengths, num_rows,
            budget_bytes, grad_filter, logits_dtype, backend: as linear_preference_loss.

    Returns:
        LikelihoodOutput(loss, logp [S]), float32; only `loss` carries a gradient, to `hidden`, `weight`, `bias` and
        `adapter`.

    Raises:
        ValueError: a shape, dtype, device, option or label is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Compiled, Numerics, Memory: as linear_preference_loss.
    Cost: forward alone 2NDV flops, frozen head 4NDV, trained head 6NDV, whatever the length and the budget: what each
        row weighs is known before its log-prob. In float16, where a loss scale comes with the backward, 2DV more for
        each row beyond the budget.
    Source: ours.
    """
    check_backend_name(backend)
    tensors = checked_tensors(hidden, weight, labels, bias, adapter, "labels")
    check_sequences(tensors.target, cu_seqlens)
    tensors = with_shifted_labels(tensors, "labels", shift, ignore_index, cu_seqlens)
    labels = tensors.target
    check_name(backend, CANDIDATES)
    counts = Counts(labels, cu_seqlens, ignore_index, lengths, num_rows)
    one_group = torch.zeros(count_sequences(labels, cu_seqlens), dtype=torch.int64, device=HOST)
    length, group, _ = counts.with_groups(one_group)
    dtype = logp_dtype(hidden.dtype)
    weights = torch.ones_like(length, dtype=dtype) if seq_weight is None else _checked(seq_weight, length).to(dtype)
    transform = (logit_scale, softcap, temperature)
    rows = counts.rows()
    options = checked_options(tensors, *transform, ignore_index, rows, budget_bytes, grad_filter, logits_dtype, backend)
    if takes_one_pass(tensors, options):
        total, logp = counts.nan_where_wrong(likelihood_in_one_pass(tensors, options, length, group, weights))
    else:
        (logp,) = counts.nan_where_wrong((sequence_logp(tensors, options, cu_seqlens),))
        total = -(weights * logp).where(weights != 0, 0.0).sum()
    counted = rows if rows >= 0 else length.sum().clamp(min=1)
    return LikelihoodOutput(reduce_loss(total, "mean", normalizer, counted), logp.detach())


def _checked(seq_weight: Tensor, length: Tensor) -> Tensor:
    check_tensor("seq_weight", seq_weight)
    check_float("seq_weight", seq_weight)
    check_shape("seq_weight", seq_weight, "[S]", len(length))
    check_device("seq_weight", seq_weight, "hidden", length.device)
    check_constant("seq_weight", seq_weight)
    return seq_weight
