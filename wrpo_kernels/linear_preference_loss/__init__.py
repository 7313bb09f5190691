"""The family of preference losses from hidden states in, loss and gradients out; the logits are never stored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from wrpo_kernels.checks import check_backend_name
from wrpo_kernels.dispatch.backends import check_name
from wrpo_kernels.linear_preference_loss import contract
from wrpo_kernels.linear_preference_loss.lengths import Counts, Lengths, per_sequence
from wrpo_kernels.linear_token_logp import contract as token_contract
from wrpo_kernels.lm_head.budget import rows_before_pieces
from wrpo_kernels.lm_head.head import LabelsByPosition
from wrpo_kernels.lm_head.inputs import HeadOptions, HeadTensors, checked_options, checked_tensors
from wrpo_kernels.lm_head.labels import with_shifted_labels
from wrpo_kernels.lm_head.rows import most_rows
from wrpo_kernels.preference_loss import PreferenceOutput, loss_of_sequences
from wrpo_kernels.preference_loss.arguments import loss_arguments
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences
from wrpo_kernels.preference_loss.reduction import reduce_loss
from wrpo_kernels.token_logp.contract import logp_dtype

SMALL_HEAD = 1 << 18  # elements of a weight [V, D] that is at home in the cache


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logp: Tensor | None = None,
    *,
    seq_weight: Tensor,
    group: Tensor,
    beta: float | Tensor,
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
    num_groups: int | None = None,
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
    """`preference_loss` of the responses whose hidden states are given, without storing their logits.

        logp[s] = sum_t log softmax(z[s, t])[labels[s, t]]            over the labels that count; z as linear_token_logp
        loss    = preference_loss(logp, ref_logp, ...)                formula and remaining arguments: see there

    labels[s, t] is predicted from hidden[s, t]. In a batch of Hugging Face it is from hidden[s, t - 1]: pass its labels
    whole and shift=True.

    Args:
        hidden: [S, T, D] float32 | bfloat16 | float16, or packed [N, D] with `cu_seqlens`.
        weight: [V, D] head.
        labels: [S, T] int64 | int32 (or [N]); `ignore_index` marks prompt and padding, which never reach the head.
        ref_logp: [S] float32, summed reference log-prob of each response; None is reference-free.
        seq_weight, group, beta, gamma, loss_type, loss_weights, f_divergence_type, f_alpha_divergence_coef,
            label_smoothing, discopop_tau, length_normalize, nll_weight, group_weight, num_groups, reduction,
            normalizer, empty: as preference_loss. `group` may lie on the CPU beside an accelerator.
        bias, adapter, logit_scale, softcap, temperature, ignore_index: as linear_token_logp.
        shift: how many positions before its label a hidden state stands, within its own sequence; True is 1. Only
            labels are moved; `lengths` and `num_rows` count those that are left. Default: False, 0.
        cu_seqlens: [S+1] int32 | int64, bounds of the packed sequences, best on the CPU. Default: none, padded form.
        lengths: [S] list, tuple or int tensor on the CPU, how many labels of each sequence count, where the host knows.
            Wrong ones are an error where the labels are on the CPU, and make NaN of all outputs elsewhere. With them,
            and with `group` on the CPU where a group may exceed the budget, no call waits for an accelerator. Default:
            counted, which waits once, and once more to plan the passes of a trained head beyond the budget.
        num_rows: how many labels count in all, for a caller who knows no more, as in linear_token_logp. Default: the
            sum of `lengths`, or counted.
        budget_bytes: what the logits that exist at a time may take. Default: 512 MiB; on an accelerator a 32nd of its
            memory, at most 4 GiB.
        grad_filter: eps > 0 leaves tokens that matter nowhere out of the gradients, with the bounds of
            linear_token_logp, where c_t is d loss / d logp of the row's sequence. Default: None, exact.
        logits_dtype: torch.float32 for logits of 16-bit operands that are not rounded before their softmax, as in
            linear_token_logp. Default: None, that of `hidden`.
        backend: "native", "cuda", "triton" or "reference", the row kernel; or "triton_exp", as in linear_token_logp.
            Default: the first that can.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [G]), float32; only `loss` carries a gradient, to `hidden`,
        `weight`, `bias` and `adapter`.

    Raises:
        ValueError: a shape, dtype, device, option or label is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

        On an accelerator and in compiled code values are not looked at first: what is wrong in labels, lengths, bounds,
        groups or `num_rows` raises or makes NaN of the loss and its gradient, as preference_loss says.

    Compiled: as preference_loss; `num_rows` may change from call to call too, and so may `lengths` as a tensor, which
        make NaN where they are wrong. A tensor that is traced has no values: give `num_rows` beside it.
    Numerics: as linear_token_logp and preference_loss. A group of weight 0 is out of the loss, but not NaN or infinity
        in its hidden states out of the head's gradient: set its labels to `ignore_index` and `empty` to "zero".
    Memory: `budget_bytes`; on a CPU 32 MiB of it or 512 rows, whichever is more (of a trained 16-bit head 4D rows),
        unless a group is larger and either not the first such or has `nll_weight` beside a margin: then as many as it
        has, or as fit. A 16-bit trained head whose rows do not go at once keeps its dW in float32 until the backward
        has rounded it, and a second one while a second group that does not fit by itself is added. On an accelerator
        rows that take no more memory at once than in two pieces, for want of a float32 dW, go at once.
    Cost: forward alone 2NDV flops, frozen head 4NDV, trained head 6NDV, whatever the length and the budget; an adapter
        of rank r on a frozen head 4NDV and 6NrV. N counts only the labels that count. 2DV more for each row beyond the
        budget of a group with both a margin and a likelihood term (`nll_weight`), or where that costs less than adding
        a second dW. A loss of two sides, several losses and a divergence: as linear_token_logp.
    Source: WRPO, arXiv:2412.03187.
    """
    check_backend_name(backend)
    tensors = checked_tensors(hidden, weight, labels, bias, adapter, "labels")
    check_sequences(tensors.target, cu_seqlens)
    tensors = with_shifted_labels(tensors, "labels", shift, ignore_index, cu_seqlens)
    labels = tensors.target
    counts = Counts(labels, cu_seqlens, ignore_index, lengths, num_rows)
    length, group, on_host = counts.with_groups(group)
    loss, mixture, counted = loss_arguments(
        length,
        logp_dtype(hidden.dtype),
        ref_logp=ref_logp,
        seq_weight=seq_weight,
        group=group,
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        length=length,
        lengths=counts.told,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
        group_weight=group_weight,
        num_groups=num_groups,
        empty=empty,
    )
    check_name(backend, contract.CANDIDATES)
    transform = (logit_scale, softcap, temperature)
    options = checked_options(
        tensors, *transform, ignore_index, counts.rows(), budget_bytes, grad_filter, logits_dtype, backend
    )
    if mixture is None and reduction != "none" and takes_one_pass(tensors, options):
        outputs = in_one_pass(tensors, options, loss, on_host, counted, reduction, normalizer)
        return PreferenceOutput(*counts.nan_where_wrong(outputs))
    (logp,) = counts.nan_where_wrong((sequence_logp(tensors, options, cu_seqlens),))
    return loss_of_sequences(logp, loss, mixture, counted, reduction, normalizer, contract.loss_backend(backend))


def takes_one_pass(tensors: HeadTensors, options: HeadOptions) -> bool:
    """Whether gradients are made together with the loss, to be scaled in the backward.

    So for a head that is trained, itself or by an adapter, and whose rows do not fit the budget together, where
    anything else would cost more products, or on a CPU are so many that memory for their deltas costs more than walking
    them in pieces; and for a small head whose rows fit: its gradient is scaled in less time than a second op takes to
    call. Elsewhere the rows' deltas are kept for the backward, and a frozen head takes one pass anyway.

    Not in float16: a loss scale comes with the backward, too late for gradients that have already run out of bits.
    """
    hidden, weight = tensors.hidden, tensors.weight
    if hidden.dtype == torch.float16:
        return False
    sizes = (options.budget_bytes, hidden, weight, tensors.up)
    at_once = rows_before_pieces(*sizes, options.asked.weight, options.logit_bytes(hidden))
    if most_rows(options.num_rows, tensors.target) > at_once:
        return options.asked.of_head
    vocabulary, width = weight.shape
    return vocabulary * width <= SMALL_HEAD and any(options.gradients)


def in_one_pass(
    tensors: HeadTensors,
    options: HeadOptions,
    loss: LossArguments,
    on_host: Tensor | None,
    counted: int | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
) -> PreferenceOutput:
    """The output, with the gradients made beside it."""
    # The mean over all groups is the op's own: a division outside is a node of the graph with a backward.
    averages = reduction == "mean" and normalizer is None and not isinstance(counted, Tensor)
    total, logp, reward, margin, *_ = contract.linear_preference_loss(
        tensors, loss.sequences, on_host, options, loss.num_groups, loss.family, averages, True
    )
    value = total if averages else reduce_loss(total, reduction, normalizer, counted)
    return PreferenceOutput(value, logp, reward, margin)


def likelihood_in_one_pass(
    tensors: HeadTensors, options: HeadOptions, length: Tensor, group: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """-sum_s weights[s] logp[s] [] and logp [S], with the gradients made beside them: one group, all of `group` [S] is
    0, whose margin counts for nothing."""
    nothing, groups = weights.new_zeros(1), min(len(weights), 1)
    sequences = Sequences(None, nothing.expand(len(weights)), group, length, weights, nothing[:groups])
    family = Family(1.0, 0.0, "sigmoid", 0.0, 0.05, False)
    total, logp, *_ = contract.linear_preference_loss(tensors, sequences, None, options, groups, family, False, False)
    return total, logp


def sequence_logp(tensors: HeadTensors, options: HeadOptions, cu_seqlens: Tensor | None) -> Tensor:
    """[S] float32 summed log-probs, with their own derivative."""
    is_compiling = torch.compiler.is_compiling()
    with nullcontext() if is_compiling else LabelsByPosition("labels", tensors, options.ignore_index):
        token_logp, _, _ = token_contract.linear_token_logp(tensors, options)
    return per_sequence(token_logp, cu_seqlens)


def check_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        contract.check_cu_seqlens(cu_seqlens, labels)
    elif labels.dim() != 2:
        raise ValueError(f"labels must be [S, T], or packed [N] with cu_seqlens, got {list(labels.shape)}")
