"""What a language-model head says of each token besides its log-probability, in the same pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.checks import check_device, check_int64, int64_labels, is_readable
from wrpo_kernels.dispatch.backends import check_name
from wrpo_kernels.linear_token_statistics import contract
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.lm_head.head import no_autocast
from wrpo_kernels.lm_head.inputs import HeadOptions, HeadTensors, checked_options, checked_tensors
from wrpo_kernels.lm_head.labels import with_shifted_labels
from wrpo_kernels.lm_head.rows import count_labels, count_rows, nan_unless_counted
from wrpo_kernels.token_logp.reference import scores_of


class TokenStatistics(NamedTuple):
    """Each [...] as `target`, 0 (`top1`: -1) where ignored; None where it was not asked for."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None
    top1: Tensor | None
    mean_logits: Tensor | None
    log_sum_sq_probs: Tensor | None
    logp_of_ids: Tensor | None  # [..., K]


OUTPUTS = TokenStatistics._fields[1:-1]


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    outputs: Sequence[str] = OUTPUTS,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool | int = False,
    num_rows: int | None = None,
    budget_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """`linear_token_logp` and, of the same logits, the entropy and other statistics of each token's distribution.

        z, logp as linear_token_logp;   p = softmax_v z[n, v]
        lse[n]              = logsumexp_v z[n, v]
        entropy[n]          = -sum_v p_v log p_v
        mean_logits[n]      = 1/V sum_v z[n, v]
        log_sum_sq_probs[n] = log sum_v p_v^2
        top1[n]             = argmax_v z[n, v], the first of equals
        logp_of_ids[n, k]   = z[n, ids[k]] - lse[n]

    Args:
        hidden, weight, target: as linear_token_logp.
        outputs: which of "entropy", "lse", "top1", "mean_logits", "log_sum_sq_probs". Default: all.
        ids: [K] int64 | int32 in [0, V), a few tokens whose log-probs are wanted at every position. Default: none.
        bias, adapter, logit_scale, softcap, temperature, ignore_index, shift, num_rows, budget_bytes, logits_dtype: as
            linear_token_logp.
        backend: "native", "cuda", "triton" or "reference". Default: the first that can.

    Returns:
        TokenStatistics(logp, entropy, lse, top1, mean_logits, log_sum_sq_probs, logp_of_ids): float32, nats; top1 is
        int64. All others are differentiable in `hidden`, `weight`, `bias` and `adapter`, for any upstream gradients.

    Raises:
        ValueError: a shape, dtype, device, option or target out of range, or an unknown output; the message names it.
            To "cuda" and "triton" a target out of range makes NaN of its own values instead, and top1 -1.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

    Numerics: as linear_token_logp; logits that are -inf have no share in entropy and gradient. "cuda" and "triton" read
        a row once for all that is asked, and pay for nothing else; the others read it again for the statistics.
    Memory: `budget_bytes`, of which three quarters keep logits for the backward.
    Cost: as linear_token_logp with a trained head; with a frozen head 4NDV, and 2DV for each row whose logits did not
        fit the budget. `ids` add 2NDK, and 4NDK in the backward. linear_token_logp costs a little less.
    Source: entropy of the policy as a bonus, arXiv:1602.01783; sum of p^2 in WPO's weights, arXiv:2406.11827.
    """
    outputs = outputs if isinstance(outputs, str) or not isinstance(outputs, Iterable) else list(outputs)
    if not isinstance(outputs, list) or not all(name in OUTPUTS for name in outputs):
        raise ValueError(f"outputs must be names among {list(OUTPUTS)}, got {outputs!r}")
    tensors = checked_tensors(hidden, weight, target, bias, adapter)
    tensors = with_shifted_labels(tensors, "target", shift, ignore_index)
    target = tensors.target
    counted = count_labels(target.reshape(1, -1), ignore_index)
    rows = count_rows(counted, target.numel(), num_rows)
    check_name(backend, contract.CANDIDATES)
    transform = (logit_scale, softcap, temperature)
    options = checked_options(tensors, *transform, ignore_index, rows, budget_bytes, None, logits_dtype, backend)
    wanted = Wanted(*(name in outputs for name in Wanted._fields))
    values, top1, _ = contract.linear_token_statistics(tensors, options, wanted)
    (values,) = nan_unless_counted((values,), counted, num_rows)
    found = dict(zip(COLUMNS, values.unbind(1), strict=True), top1=top1)
    of_ids = None if ids is None else _logp_of_ids(ids, tensors, options, found["lse"], found["lse_rest"])
    asked = ("logp", *outputs)
    shown = {name: value.view(target.shape) for name, value in found.items() if name in asked}
    return TokenStatistics(**{**dict.fromkeys(OUTPUTS), **shown, "logp_of_ids": of_ids})


def _check_ids(ids: Tensor, weight: Tensor) -> Tensor:
    ids = int64_labels("ids", ids)
    check_int64("ids", ids)
    if ids.dim() != 1:
        raise ValueError(f"ids must be [K], got {list(ids.shape)}")
    check_device("ids", ids, "weight", weight.device)
    if is_readable(ids) and bool(((ids < 0) | (ids >= weight.shape[0])).any()):
        raise ValueError(f"ids must lie in [0, V={weight.shape[0]}), got {ids.tolist()}")
    return ids


def _logp_of_ids(ids: Tensor, tensors: HeadTensors, options: HeadOptions, lse: Tensor, rest: Tensor) -> Tensor:
    """[..., K], with the logits that a head of these tokens alone has."""
    hidden, weight, target, bias, low, up = tensors
    ids = _check_ids(ids, weight)
    counts = (target != options.ignore_index)[..., None]
    dtype = hidden.dtype  # operands are rounded to it, as in the products of all tokens

    def product(left: Tensor, right: Tensor) -> Tensor:
        left, right = left.where(counts, 0.0).to(dtype), right[ids].to(dtype)
        return left.float() @ right.float().t() if options.has_float32_logits else left @ right.t()

    with no_autocast(hidden):
        scores = product(hidden, weight)
        if low is not None:
            scores = scores + product(low, up)
    scores = scores_of(scores, options.transform(None if bias is None else bias[ids]))
    shape = (*target.shape, 1)
    return ((scores - lse.view(shape)) - rest.view(shape)).where(counts, 0.0)
