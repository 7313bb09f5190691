"""The registered op `wrpo::linear_token_logp`: its schema, kernel, fake and derivative."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from wrpo_kernels.checks import check_shape
from wrpo_kernels.dispatch.autograd import register, register_differentiable
from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.dispatch.schema import Arguments
from wrpo_kernels.linear_token_logp import passes
from wrpo_kernels.lm_head.budget import (
    Plan,
    plan_rows,
    row_stride,
    row_tile,
    rows_at_once,
    rows_in_passing,
    rows_within,
)
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head, LabelsByPosition, no_autocast
from wrpo_kernels.lm_head.inputs import HeadGradients, HeadOptions, HeadTensors, check_head
from wrpo_kernels.lm_head.rows import Rows, most_rows
from wrpo_kernels.token_logp.contract import check_like_logp, logp_dtype


def plan_of(tensors: HeadTensors, options: HeadOptions) -> Plan:
    """A backward needs the deltas, but for dh alone, which is made beside the log-probs and only scaled there."""
    sizes = (options.budget_bytes, tensors.hidden, tensors.weight, tensors.up)
    number, tile = most_rows(options.num_rows, tensors.target), row_tile(tensors.hidden.device)
    logit_bytes = options.logit_bytes(tensors.hidden)
    if not options.asked.of_head:
        passing = rows_in_passing(*sizes, logit_bytes)
        return plan_rows(number, passing, passing, False, tile)
    fit, at_once = rows_within(*sizes, logit_bytes), rows_at_once(*sizes, options.asked.weight, logit_bytes)
    deltas_fit = rows_within(*sizes) if options.has_float32_logits else None
    return plan_rows(number, fit, at_once, True, tile, deltas_fit)


def rows_kept(tensors: HeadTensors, options: HeadOptions) -> int:
    """How many rows leave their delta for the backward; no guard of a compiler where that is none."""
    return plan_of(tensors, options).keep if options.asked.of_head else 0


def rows_of(tensors: HeadTensors, options: HeadOptions) -> Rows:
    return Rows.that_count(tensors.hidden, tensors.target, options.ignore_index, options.num_rows, tensors.low)


def _linear_token_logp(tensors: HeadTensors, options: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(tensors.hidden), LabelsByPosition("target", tensors, options.ignore_index):
        head, rows, plan = Head(tensors, options), rows_of(tensors, options), plan_of(tensors, options)
        unscaled, kept = for_the_backward(tensors, options)
        logp = passes.forward(head, rows, plan, unscaled, kept, options.grad_filter)
        return rows.spread(logp).view(tensors.target.shape), unscaled, kept


def for_the_backward(tensors: HeadTensors, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """Memory for what the forward leaves: the unscaled gradient of the hidden states [most rows, D] and the deltas that
    are kept [keep, V], in rows of `row_stride`. Its shape does not depend on values, so that a tracing compiler knows
    it: where nobody has counted the rows, there is room for every label."""
    hidden, vocabulary = tensors.hidden, tensors.weight.shape[0]
    number = most_rows(options.num_rows, tensors.target) if options.asked.only_hidden else 0
    kept = hidden.new_empty(rows_kept(tensors, options), row_stride(hidden.device, vocabulary))
    return in_huge_pages(hidden.new_empty(number, hidden.shape[-1])), in_huge_pages(kept)


def _fake(tensors: HeadTensors, options: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    hidden, target = tensors.hidden, tensors.target
    return hidden.new_empty(target.shape, dtype=logp_dtype(hidden.dtype)), *for_the_backward(tensors, options)


def _linear_token_logp_backward(
    grad_logp: Tensor, logp: Tensor, unscaled: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions
) -> tuple[Tensor, ...]:
    hidden, asked = tensors.hidden, options.asked
    with no_autocast(hidden):
        head, rows = Head(tensors, options), rows_of(tensors, options)
        coef, logp = rows.take(grad_logp.reshape(-1, 1)), rows.take(logp.reshape(-1))
        if not asked.of_head:
            dh = rows.spread_scaled(unscaled[: len(rows)], head.coefficients(coef, logp))
            return complete(tensors, HeadGradients(dh.view(hidden.shape), None, None, None, None))
        plan = plan_of(tensors, options)
        chunks = (plan.keep > 0) + -(-(len(rows) - plan.keep) // max(plan.chunk, 1))
        gradients = Gradients(hidden, head, asked, chunks, options.grad_filter)
        passes.backward(head, rows, plan, kept, coef, logp, gradients)
        return complete(tensors, gradients.totals())


def _check_backward(
    grad_logp: Tensor, logp: Tensor, unscaled: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions
) -> None:
    check_head(tensors, options)
    check_like_logp("grad_logp", grad_logp, tensors.hidden, tensors.target.shape)
    check_like_logp("logp", logp, tensors.hidden, tensors.target.shape)
    rows = most_rows(options.num_rows, tensors.target) if options.asked.only_hidden else 0
    saved = {"unscaled": (unscaled, (rows, tensors.hidden.shape[-1]))}
    stride = row_stride(tensors.hidden.device, tensors.weight.shape[0])
    saved["kept"] = (kept, (rows_kept(tensors, options), stride))
    for name, (value, shape) in saved.items():
        check_shape(name, value, "as linear_token_logp returned it", *shape)
        if value.dtype != tensors.hidden.dtype:
            raise ValueError(f"{name} must be {tensors.hidden.dtype} as hidden, got {value.dtype}")


def complete(tensors: HeadTensors, found: HeadGradients) -> tuple[Tensor, ...]:
    """Each in the type of its tensor; empty where it was not asked for."""
    hidden, weight, _, *rest = tensors
    pairs = zip(found, (hidden, weight, *rest), strict=True)
    return tuple([hidden.new_empty(0) if grad is None else grad.to(like.dtype) for grad, like in pairs])


def _fake_backward(
    grad_logp: Tensor, logp: Tensor, unscaled: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions
) -> tuple[Tensor, ...]:
    return fake_gradients(tensors, options)


def fake_gradients(tensors: HeadTensors, options: HeadOptions) -> tuple[Tensor, ...]:
    hidden, weight, _, *rest = tensors
    pairs = zip(options.asked, (hidden, weight, *rest), strict=True)
    return tuple([like.new_empty(like.shape) if asked else hidden.new_empty(0) for asked, like in pairs])


def _save(ctx: Any, outputs: tuple[Tensor, ...], tensors: HeadTensors, options: HeadOptions) -> None:
    logp, unscaled, kept = outputs
    ctx.mark_non_differentiable(unscaled, kept)
    # A copy: the caller may change what he was given in place.
    ctx.save_for_backward(logp.detach().clone(), unscaled, kept, *tensors)
    ctx.options = options


def _backward(ctx: Any, grad_logp: Tensor, *_: None) -> dict[str, Tensor | None]:
    logp, unscaled, kept, *tensors = ctx.saved_tensors
    grads = HeadGradients(
        *linear_token_logp_backward(grad_logp, logp, unscaled, kept, HeadTensors(*tensors), ctx.options)
    )
    return {name: grad for name, grad in grads._asdict().items() if getattr(ctx.options.asked, name)}


linear_token_logp_backward = register(
    "linear_token_logp_backward",
    Arguments("Tensor grad_logp", "Tensor logp", "Tensor unscaled", "Tensor kept", HeadTensors, HeadOptions),
    "Tensor dh, Tensor dw, Tensor db, Tensor dlow, Tensor dup",
    check=_check_backward,
    kernel=_linear_token_logp_backward,
    fake=_fake_backward,
)
linear_token_logp = register_differentiable(
    "linear_token_logp",
    Arguments(HeadTensors, HeadOptions),
    "Tensor logp, Tensor unscaled, Tensor kept",
    check=check_head,
    kernel=_linear_token_logp,
    fake=_fake,
    save=_save,
    backward=_backward,
)
