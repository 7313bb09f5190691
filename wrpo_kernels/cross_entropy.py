"""Cross entropy of a language-model head, from hidden states: what supervised fine-tuning minimises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    as_float,
    check_constant,
    check_device,
    check_float,
    check_int,
    check_labels,
    check_number,
    check_shape,
    check_tensor,
    int64_labels,
    is_readable,
)
from wrpo_kernels.likelihood import linear_nll_loss
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.linear_token_statistics import linear_token_statistics
from wrpo_kernels.lm_head.head import no_autocast
from wrpo_kernels.lm_head.inputs import check_tensors
from wrpo_kernels.lm_head.labels import shifted_labels
from wrpo_kernels.lm_head.weighted_logits import weighted_mean_logits
from wrpo_kernels.logit_transform import LogitTransform, check_scalars

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool | int = False,
    num_rows: int | None = None,
    budget_bytes: int | None = None,
    grad_filter: float | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of labels under a language-model head, without storing the logits.

        z      = the logits of linear_token_logp;    lse_n = logsumexp_v z[n, v];    y = labels[n]
        loss_n = (1 - eps) w_y (lse_n - z[n, y]) + eps / V sum_v w_v (lse_n - z[n, v]) + z_loss lse_n^2
        mean   = sum_n loss_n / sum_n w_y         eps = label_smoothing, w = class_weight or 1, n counts

    labels[..., t] is predicted from hidden[..., t]. In a batch of Hugging Face it is from hidden[..., t - 1]: pass its
    labels whole and shift=True.

    Args:
        hidden: [..., D] float32 | bfloat16 | float16.
        weight: [V, D] head.
        labels: [...] int64 | int32 in [0, V), or `ignore_index`: such positions never reach the head.
        reduction: "mean" over the labels that count, by class_weight where there is one, and NaN where none counts, as
            in torch; "sum"; "none", 0 where ignored. Default: "mean".
        class_weight: [V] weight of each token as a label, a constant. Default: 1 each.
        label_smoothing: eps in [0, 1], the share of each label that all tokens have in equal parts. Default: 0.
        z_loss: weight of the squared log-sum-exp, >= 0, which keeps the logits near 0. Default: 0.
        bias, adapter, logit_scale, softcap, temperature, ignore_index, shift, num_rows, budget_bytes, grad_filter,
            logits_dtype, backend: as linear_token_logp.

    Returns:
        [] float32, nats; [...] of `labels` for "none". Differentiable in `hidden`, `weight`, `bias` and `adapter`.

    Raises:
        ValueError: a shape, dtype, device, option or label is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Compiled: label_smoothing and z_loss break the graph, for they look for the labels that count.
    Numerics: as linear_token_logp. lse is the label's logit, of 16-bit hidden states a float32 product, less its logp.
    Memory: as linear_token_logp. label_smoothing and z_loss also hold the hidden states and the rows of the weight of
        the labels that count in float32, 8 N D bytes; label_smoothing with class_weight a float32 weight.
    Cost: of labels [S, T] reduced, without class_weight, label_smoothing and z_loss, as linear_nll_loss: no row is
        computed twice. Else as linear_token_logp; label_smoothing and z_loss add products of vectors, 6ND and 3VD
        flops. Under a softcap or an adapter the two are made by linear_token_statistics, with its numerics, memory and
        cost; label_smoothing with class_weight there makes all logits once more in plain torch, and again in the
        backward.
    Source: label smoothing, arXiv:1512.00567; z-loss, arXiv:2204.02311.
    """
    labels = int64_labels("labels", labels)
    check_tensors(hidden, weight, labels, ("hidden", "weight", "labels"))
    check_scalars(logit_scale, softcap, temperature)
    is_linear = not softcap and adapter is None
    _check_options(reduction, class_weight, label_smoothing, z_loss, is_linear, grad_filter, labels, weight)
    z_loss = as_float(z_loss)
    smoothed = bool(label_smoothing or z_loss)
    check_int("ignore_index", ignore_index)
    options: dict[str, Any] = {
        "bias": bias,
        "adapter": adapter,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "shift": shift,
        "num_rows": num_rows,
        "budget_bytes": budget_bytes,
        "logits_dtype": logits_dtype,
        "backend": backend,
    }
    if reduction != "none" and labels.dim() == 2 and class_weight is None and not smoothed:
        total = linear_nll_loss(hidden, weight, labels, normalizer=1.0, grad_filter=grad_filter, **options).loss
        counts = shifted_labels("labels", labels, shift, ignore_index, weight.shape[0]) != ignore_index
        return total if reduction == "sum" else total / counts.sum()
    if is_readable(labels):  # under the caller's name for them
        check_labels("labels", labels.reshape(-1), ignore_index, weight.shape[0])
    if smoothed and not is_linear:
        found = linear_token_statistics(hidden, weight, labels, outputs=("lse", "mean_logits"), **options)
        logp = found.logp
    else:
        logp = linear_token_logp(hidden, weight, labels, grad_filter=grad_filter, **options)
    labels = shifted_labels("labels", labels, shift, ignore_index, weight.shape[0])
    counts = labels != ignore_index
    share = counts.to(logp.dtype)
    if class_weight is not None:
        share = share * class_weight.to(logp.dtype)[labels.where(counts, 0)]
    loss = -logp * share if not label_smoothing else -logp * share * (1 - label_smoothing)
    if smoothed and not is_linear:
        mean, of_all = found.mean_logits, 1.0 if class_weight is None else class_weight.to(loss.dtype).mean()
        if label_smoothing and class_weight is not None:
            transform = LogitTransform(bias, logit_scale, softcap or 0.0, temperature)
            given = (hidden, weight, adapter, transform, logits_dtype)
            mean = weighted_mean_logits(*given, class_weight, counts, budget_bytes)
        loss = loss + label_smoothing * (of_all * found.lse - mean) + z_loss * found.lse**2
    elif smoothed:
        rows = counts.reshape(-1).nonzero()[:, 0]
        some = (hidden.reshape(-1, hidden.shape[-1])[rows], labels.reshape(-1)[rows], logp.reshape(-1)[rows])
        transform = LogitTransform(bias, logit_scale, 0.0, temperature)
        with no_autocast(hidden):
            more = _of_all_tokens(*some, weight, transform, class_weight, label_smoothing, z_loss)
        loss = loss + torch.zeros_like(loss).view(-1).index_copy(0, rows, more).view(loss.shape)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / share.sum()


def _check_options(
    reduction: str,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    is_linear: bool,
    grad_filter: float | None,
    labels: Tensor,
    weight: Tensor,
) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if class_weight is not None:
        check_tensor("weight", weight)
        check_class_weight("class_weight", class_weight, weight.shape[0], labels.device)
    check_number("label_smoothing", label_smoothing, least=0.0)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_number("z_loss", z_loss, least=0.0)
    if grad_filter is not None and (label_smoothing or z_loss) and not is_linear:
        raise ValueError("grad_filter cannot be had with label_smoothing or z_loss under a softcap or an adapter")


def check_class_weight(name: str, value: Tensor, vocabulary: int, device: torch.device) -> None:
    check_tensor(name, value)
    check_float(name, value)
    check_shape(name, value, "[V]", vocabulary)
    check_device(name, value, "the labels", device)
    check_constant(name, value)


def _of_all_tokens(
    hidden: Tensor,
    labels: Tensor,
    logp: Tensor,
    weight: Tensor,
    transform: LogitTransform,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """[N] eps / V sum_v w_v (lse - z_v) + z_loss lse^2 of rows whose log-probs are known. No logit is made but the
    label's: lse = z_y - logp, and a sum of logits is one product with the sum of their rows of the weight."""
    kind = logp.dtype
    hidden = hidden.to(kind)
    own = (hidden * weight[labels].to(kind)).sum(1)
    if transform.bias is not None:
        own = own + transform.bias.to(kind)[labels]
    log_sum = transform.slope * own - logp
    total = z_loss * log_sum**2
    if not label_smoothing:
        return total
    if class_weight is None:
        direction, weights = weight.sum(0, dtype=kind), weight.shape[0]
        offset = 0.0 if transform.bias is None else transform.bias.sum(dtype=kind)
    else:
        class_weight = class_weight.to(kind)
        direction, weights = class_weight @ weight.to(kind), class_weight.sum()
        offset = 0.0 if transform.bias is None else class_weight @ transform.bias.to(kind)
    scores = transform.slope * (hidden @ direction + offset)  # sum_v w_v z_v
    return total + label_smoothing / weight.shape[0] * (weights * log_sum - scores)
