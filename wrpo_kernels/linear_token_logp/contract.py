"""The registered op `wrpo::linear_token_logp`: its check, schema, fake and autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    check_backend_name,
    check_device,
    check_float,
    check_int,
    check_int64,
    check_shape,
    check_tensor,
)
from wrpo_kernels.dispatch.autograd import register_differentiable, register_kernel
from wrpo_kernels.linear_token_logp import passes
from wrpo_kernels.lm_head.budget import Plan, plan_rows, rows_within
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head, LabelsByPosition, no_autocast
from wrpo_kernels.lm_head.products import scaled_rows
from wrpo_kernels.lm_head.rows import UNCOUNTED, Rows
from wrpo_kernels.logit_transform import LogitTransform, check_transform
from wrpo_kernels.token_logp.contract import logp_dtype

# num_rows is how many labels count, or UNCOUNTED; `keeps` says which gradients will be asked for, of hidden, weight,
# bias, low and up. They fix the shapes of what is saved, so that a tracing compiler knows them too.
_TENSORS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? low, Tensor? up"
_OPTIONS = (
    "float logit_scale, float softcap, float temperature, int ignore_index, SymInt num_rows, SymInt budget_bytes, "
    "bool[] keeps, float grad_filter, str? backend"
)
_GRADS = "Tensor dh, Tensor dw, Tensor db, Tensor dlow, Tensor dup"
torch.library.define(
    "wrpo::linear_token_logp", f"({_TENSORS}, {_OPTIONS}) -> (Tensor logp, Tensor unscaled, Tensor kept)"
)
torch.library.define(
    "wrpo::linear_token_logp_backward",
    f"(Tensor grad_logp, Tensor unscaled, Tensor kept, {_TENSORS}, {_OPTIONS}) -> ({_GRADS})",
)


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str | None = None,
    target_name: str = "target",
) -> None:
    for name, value in (("hidden", hidden), ("weight", weight)):
        check_tensor(name, value)
        check_float(name, value)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be [V, D] with V >= 1 and D >= 1, got {list(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be [..., D={weight.shape[1]}] as weight [V, D], got {list(hidden.shape)}")
    check_device("weight", weight, "hidden", hidden.device)
    check_tensor(target_name, target)
    check_int64(target_name, target)
    check_shape(target_name, target, "hidden's leading shape", *hidden.shape[:-1])
    check_device(target_name, target, "hidden", hidden.device)
    check_transform(bias, logit_scale, softcap, temperature, hidden, weight.shape[0])
    check_int("ignore_index", ignore_index)
    check_backend_name(backend)


def bound(num_rows: int, target: Tensor) -> int:
    return target.numel() if num_rows == UNCOUNTED else num_rows


def _needs_delta_again(keeps: Sequence[bool]) -> bool:
    """Whether a backward needs deltas: dh alone is made beside the log-probs and only scaled there."""
    return any(keeps[1:])


def _only_hidden(keeps: Sequence[bool]) -> bool:
    return keeps[0] and not _needs_delta_again(keeps)


def _plan(
    hidden: Tensor, weight: Tensor, up: Tensor | None, num_rows: int, budget_bytes: int, keeps: Sequence[bool]
) -> Plan:
    return plan_rows(num_rows, rows_within(budget_bytes, hidden, weight, up), _needs_delta_again(keeps))


def _open(hidden, weight, target, bias, low, up, options):
    *scalars, ignore_index, num_rows, budget_bytes, keeps, _, backend = options
    head = Head(hidden, weight, LogitTransform(bias, *scalars), ignore_index, backend, up)
    rows = Rows.that_count(hidden, target, ignore_index, num_rows, low)
    return head, rows, _plan(hidden, weight, up, bound(num_rows, target), budget_bytes, keeps)


def _linear_token_logp(hidden, weight, target, bias, low, up, *options):
    keeps, grad_filter = options[6:8]
    with no_autocast(hidden), LabelsByPosition("target", target, options[3], weight.shape[0]):
        head, rows, plan = _open(hidden, weight, target, bias, low, up, options)
        logp, unscaled, kept = passes.forward(head, rows, plan, _only_hidden(keeps), grad_filter)
        return rows.spread(logp).view(target.shape), unscaled, kept


def _linear_token_logp_backward(grad_logp, unscaled, kept, hidden, weight, target, bias, low, up, *options):
    keeps, grad_filter = options[6:8]
    with no_autocast(hidden):
        if not _needs_delta_again(keeps):
            rows = Rows.that_count(hidden, target, *options[3:5])
            scaled = scaled_rows(unscaled[: len(rows)], rows.take(grad_logp.reshape(-1, 1)))
            return rows.spread(scaled).view(hidden.shape), *[hidden.new_empty(0) for _ in keeps[1:]]
        head, rows, plan = _open(hidden, weight, target, bias, low, up, options)
        chunks = (plan.keep > 0) + -(-(len(rows) - plan.keep) // max(plan.chunk, 1))
        gradients = Gradients(hidden, head, keeps, chunks, grad_filter)
        passes.backward(head, rows, plan, kept, rows.take(grad_logp.reshape(-1, 1)), gradients)
        totals = zip(gradients.totals(), (hidden, weight, bias, low, up), strict=True)
        return tuple(hidden.new_empty(0) if total is None else total.to(like.dtype) for total, like in totals)


@torch.library.register_fake("wrpo::linear_token_logp")
def _fake(hidden, weight, target, bias, low, up, *options):
    check(hidden, weight, target, bias, *options[:4])
    num_rows, budget_bytes, keeps = options[4:7]
    num_rows = bound(num_rows, target)
    plan = _plan(hidden, weight, up, num_rows, budget_bytes, keeps)
    logp = hidden.new_empty(target.shape, dtype=logp_dtype(hidden.dtype))
    unscaled = hidden.new_empty(num_rows if _only_hidden(keeps) else 0, hidden.shape[-1])
    return logp, unscaled, hidden.new_empty(plan.keep, weight.shape[0])


@torch.library.register_fake("wrpo::linear_token_logp_backward")
def _fake_backward(grad_logp, unscaled, kept, hidden, weight, target, bias, low, up, *options):
    kept_of = zip(options[6], (hidden, weight, bias, low, up), strict=True)
    return tuple(like.new_empty(like.shape) if keep else hidden.new_empty(0) for keep, like in kept_of)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1], output[2], *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx, grad_logp, *_):
    grads = linear_token_logp_backward(grad_logp, *ctx.saved_tensors, *ctx.options)
    hidden, weight, *rest = (grad if keep else None for grad, keep in zip(grads, ctx.options[6], strict=True))
    return hidden, weight, None, *rest


linear_token_logp_backward = register_kernel("linear_token_logp_backward", _linear_token_logp_backward)
linear_token_logp = register_differentiable("linear_token_logp", _linear_token_logp, _save, _backward)
