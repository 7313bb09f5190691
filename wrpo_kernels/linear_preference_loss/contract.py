"""The registered op `wrpo::linear_preference_loss`: check, schema, fake and autograd of the one-pass form.

The op returns the sum or the mean of the losses of all groups together with its gradients, so that the backward only
scales them. Rows that fit the budget together take another way: see the public function.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from wrpo_kernels.checks import check_tensor
from wrpo_kernels.dispatch.autograd import owns_saved, register_differentiable, register_kernel
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.linear_preference_loss import one_pass
from wrpo_kernels.linear_token_logp.contract import bound
from wrpo_kernels.lm_head.budget import rows_within
from wrpo_kernels.lm_head.gradients import Gradients, total_dtype
from wrpo_kernels.lm_head.head import Head, LabelsByPosition, no_autocast
from wrpo_kernels.lm_head.products import STRIPE_BYTES
from wrpo_kernels.lm_head.rows import Rows
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.preference_loss import contract as preference
from wrpo_kernels.preference_loss.family import Family
from wrpo_kernels.token_logp.contract import logp_dtype

torch.library.define(
    "wrpo::linear_preference_loss",
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? low, Tensor? up, "
    "Tensor? ref_logp, Tensor seq_weight, Tensor group, Tensor length, Tensor? nll_weight, Tensor? group_weight, "
    "SymInt num_groups, float beta, float gamma, str loss_type, float label_smoothing, bool length_normalize, "
    "bool averages, float logit_scale, float softcap, float temperature, int ignore_index, "
    "SymInt budget_bytes, bool[] keeps, SymInt num_rows, float grad_filter, str? backend) -> "
    "(Tensor loss, Tensor logp, Tensor reward, Tensor margin, "
    "Tensor dh, Tensor dw, Tensor db, Tensor dlow, Tensor dup)",
)
torch.library.define("wrpo::scaled_to", "(Tensor total, Tensor factor, ScalarType dtype) -> Tensor")


def check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [S+1] int32 or int64, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"with cu_seqlens, labels must be packed [N], got {list(labels.shape)}")


torch.library.define("wrpo::checked_cu_seqlens", "(Tensor cu_seqlens, SymInt num_rows) -> Tensor")


@torch.library.impl("wrpo::checked_cu_seqlens", "CompositeExplicitAutograd")
def _checked_cu_seqlens(cu_seqlens, num_rows):
    """The bounds as int64; an op, so that compiled code too looks at the values before a kernel follows them."""
    if cu_seqlens.device.type == "cpu":  # elsewhere reading them would wait for the device
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_rows or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to N={num_rows}, got {bounds}")
    return cu_seqlens.to(torch.int64, copy=True)


@torch.library.register_fake("wrpo::checked_cu_seqlens")
def _fake_checked_cu_seqlens(cu_seqlens, num_rows):
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


def _linear_preference_loss(hidden, weight, target, bias, low, up, *arguments):
    num_groups, family, averages, scalars = arguments[6], Family(*arguments[7:12]), arguments[12], arguments[13:16]
    ignore_index, budget_bytes, keeps, num_rows, grad_filter, backend = arguments[16:]
    divisor = max(num_groups, 1) if averages else 1
    preference.check_groups(arguments[2], num_groups)
    sequences = one_pass.Sequences(*preference.as_constants(logp_dtype(hidden.dtype), *arguments[:6]))
    fit, chunks = _chunks(hidden, weight, up, target, budget_bytes, num_rows)
    with no_autocast(hidden), LabelsByPosition("labels", target, ignore_index, weight.shape[0]):
        head = Head(hidden, weight, LogitTransform(bias, *scalars), ignore_index, backend, up)
        rows = Rows.that_count(hidden, target, ignore_index, num_rows, low)
        gradients = Gradients(hidden, head, keeps, chunks, grad_filter)
        kernel = choose("preference_loss", backend, preference.CANDIDATES, sequences.seq_weight)
        result = one_pass.run(head, rows, sequences, num_groups, family, divisor, fit, gradients, kernel)
        return result.total, *result[2:], *gradients.totals()


def _chunks(hidden, weight, up, target, budget_bytes, num_rows):
    """Rows that fit the budget, and chunks in which the gradients are added up: two stand for any number."""
    fit = rows_within(budget_bytes, hidden, weight, up)
    return fit, 1 if bound(num_rows, target) <= fit else 2


def _scaled_to(total, factor, dtype):
    """factor * total, rounded to `dtype` a stripe at a time: no float32 copy of the whole."""
    out = torch.empty_like(total, dtype=dtype)
    if out.is_cuda:  # one kernel rounds what it multiplies; on the CPU `out` of another type costs a float32 copy
        return torch.mul(total, factor, out=out)
    step = max(1, STRIPE_BYTES // (4 * max(total[:1].numel(), 1)))
    for first in range(0, len(total), step):
        out[first : first + step] = total[first : first + step] * factor
    return out


@torch.library.register_fake("wrpo::scaled_to")
def _fake_scaled_to(total, factor, dtype):
    return torch.empty_like(total, dtype=dtype)


@torch.library.register_fake("wrpo::linear_preference_loss")
def _fake(hidden, weight, target, bias, low, up, *arguments):
    length, num_groups, keeps = arguments[3], arguments[6], arguments[18]
    wide = logp_dtype(hidden.dtype)
    _, chunks = _chunks(hidden, weight, up, target, arguments[17], arguments[19])
    dw, dup = (None if like is None else total_dtype(hidden.dtype, like.dtype, chunks) for like in (weight, up))
    logp, margin = hidden.new_empty(length.shape[0], dtype=wide), hidden.new_empty(num_groups, dtype=wide)
    kinds = zip(keeps, (hidden, weight, bias, low, up), (hidden.dtype, dw, wide, hidden.dtype, dup), strict=True)
    grads = [hidden.new_empty(like.shape, dtype=kind) if keep else hidden.new_empty(0) for keep, like, kind in kinds]
    return logp.new_empty(()), logp, torch.empty_like(logp), margin, *grads


def _save(ctx, inputs, output):
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], *inputs[3:6])]
    ctx.keeps = inputs[24]
    ctx.mark_non_differentiable(*[x for x in output[1:] if x is not None])
    ctx.save_for_backward(*output[4:])


def _backward(ctx, grad_loss, *_):
    scaled = _scaled_for_good if owns_saved(ctx) else _scaled
    grads = zip(ctx.saved_tensors, ctx.dtypes, ctx.keeps, strict=True)
    hidden, weight, *rest = [scaled(total, grad_loss, dtype) if keep else None for total, dtype, keep in grads]
    return (hidden, weight, None, *rest) + (None,) * 6


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return total * factor if total.dtype == dtype == factor.dtype else scaled_to(total, factor, dtype)


def _scaled_for_good(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in the memory of the total; a factor of 1 that is at hand leaves nothing to do."""
    if total.dtype == dtype and factor.is_cpu and factor.item() == 1.0:
        return total
    return total.mul_(factor) if total.dtype == dtype == factor.dtype else scaled_to(total, factor, dtype)


scaled_to = register_kernel("scaled_to", _scaled_to)
linear_preference_loss = register_differentiable("linear_preference_loss", _linear_preference_loss, _save, _backward)
