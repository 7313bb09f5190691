"""The registered op `wrpo::linear_token_statistics`: its schema, kernel, fake and derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_device, check_shape
from wrpo_kernels.dispatch.autograd import register, register_differentiable
from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.dispatch.schema import Arguments
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.linear_token_logp.contract import complete, fake_gradients, rows_of
from wrpo_kernels.linear_token_statistics import cuda, native, passes, reference
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.lm_head.budget import Plan, row_stride, row_tile, rows_in_passing, rows_within
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head, LabelsByPosition, no_autocast
from wrpo_kernels.lm_head.inputs import HeadGradients, HeadOptions, HeadTensors, check_head
from wrpo_kernels.lm_head.rows import most_rows
from wrpo_kernels.token_logp.contract import logp_dtype

CANDIDATES = (native, cuda, TritonBackend("wrpo_kernels.linear_token_statistics.triton_kernel"), reference)


def plan_of(tensors: HeadTensors, options: HeadOptions) -> Plan:
    sizes = (options.budget_bytes, tensors.hidden, tensors.weight, tensors.up)
    is_trained = any(options.gradients)
    fit = (rows_within if is_trained else rows_in_passing)(*sizes, options.logit_bytes(tensors.hidden))
    kept_fit = rows_within(*sizes, _kept_dtype(tensors, options).itemsize)
    number, tile = most_rows(options.num_rows, tensors.target), row_tile(tensors.hidden.device)
    return passes.plan_rows(number, fit, kept_fit, is_trained, tile)


def shape_of_kept(tensors: HeadTensors, options: HeadOptions) -> tuple[int, int]:
    """Logits of the rows that are kept, each with what aligns it."""
    return plan_of(tensors, options).keep, row_stride(tensors.hidden.device, tensors.weight.shape[0])


def _empty_kept(tensors: HeadTensors, options: HeadOptions) -> Tensor:
    empty = tensors.hidden.new_empty(shape_of_kept(tensors, options), dtype=_kept_dtype(tensors, options))
    return in_huge_pages(empty)


def _kept_dtype(tensors: HeadTensors, options: HeadOptions) -> torch.dtype:
    return torch.float32 if options.has_float32_logits else tensors.hidden.dtype


def _linear_token_statistics(
    tensors: HeadTensors, options: HeadOptions, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """values [M, 6] of COLUMNS and top1 [M] of all M positions, and the logits that are kept."""
    with no_autocast(tensors.hidden), LabelsByPosition("target", tensors, options.ignore_index):
        head = Head(tensors, options, CANDIDATES)
        rows, plan = rows_of(tensors, options), plan_of(tensors, options)
        kept = _empty_kept(tensors, options)
        logits = kept[:, : tensors.weight.shape[0]]
        values, top1 = passes.forward(head, rows, plan, logits, wanted)
        return rows.spread(values), rows.spread(top1 + 1) - 1, kept


def _fake(tensors: HeadTensors, options: HeadOptions, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    hidden, number = tensors.hidden, tensors.target.numel()
    values = hidden.new_empty(number, len(COLUMNS), dtype=logp_dtype(hidden.dtype))
    return values, tensors.target.new_empty(number), _empty_kept(tensors, options)


def _linear_token_statistics_backward(
    grad_values: Tensor, values: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions, wanted: Wanted
) -> tuple[Tensor, ...]:
    hidden = tensors.hidden
    with no_autocast(hidden):
        head = Head(tensors, options, CANDIDATES)
        rows, plan = rows_of(tensors, options), plan_of(tensors, options)
        chunks = 1 if len(rows) <= plan.chunk else 2
        gradients = Gradients(hidden, head, options.asked, chunks)
        told = (rows.take(values), rows.take(grad_values))
        logits = kept[:, : tensors.weight.shape[0]]
        passes.backward(head, rows, plan, logits, *told, gradients, wanted)
        return complete(tensors, gradients.totals())


def _check_backward(
    grad_values: Tensor, values: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions, wanted: Wanted
) -> None:
    check_head(tensors, options)
    hidden, number = tensors.hidden, tensors.target.numel()
    wide = logp_dtype(hidden.dtype)
    saved = {
        "grad_values": (grad_values, wide, (number, len(COLUMNS))),
        "values": (values, wide, (number, len(COLUMNS))),
        "kept": (kept, _kept_dtype(tensors, options), shape_of_kept(tensors, options)),
    }
    for name, (value, dtype, shape) in saved.items():
        check_shape(name, value, "as linear_token_statistics returned it", *shape)
        check_device(name, value, "hidden", hidden.device)
        if value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


def _fake_backward(
    grad_values: Tensor, values: Tensor, kept: Tensor, tensors: HeadTensors, options: HeadOptions, wanted: Wanted
) -> tuple[Tensor, ...]:
    return fake_gradients(tensors, options)


def _check(tensors: HeadTensors, options: HeadOptions, wanted: Wanted) -> None:
    check_head(tensors, options)


def _save(ctx: Any, outputs: tuple[Tensor, ...], tensors: HeadTensors, options: HeadOptions, wanted: Wanted) -> None:
    values, top1, kept = outputs
    ctx.mark_non_differentiable(top1, kept)
    ctx.save_for_backward(values, kept, *tensors)
    ctx.options, ctx.wanted = options, wanted


def _backward(ctx: Any, grad_values: Tensor, *_: None) -> dict[str, Tensor | None]:
    values, kept, *tensors = ctx.saved_tensors
    asked = (grad_values.contiguous(), values, kept, HeadTensors(*tensors), ctx.options, ctx.wanted)
    grads = HeadGradients(*linear_token_statistics_backward(*asked))
    return {name: grad for name, grad in grads._asdict().items() if getattr(ctx.options.asked, name)}


linear_token_statistics_backward = register(
    "linear_token_statistics_backward",
    Arguments("Tensor grad_values", "Tensor values", "Tensor kept", HeadTensors, HeadOptions, Wanted),
    "Tensor dh, Tensor dw, Tensor db, Tensor dlow, Tensor dup",
    check=_check_backward,
    kernel=_linear_token_statistics_backward,
    fake=_fake_backward,
)
linear_token_statistics = register_differentiable(
    "linear_token_statistics",
    Arguments(HeadTensors, HeadOptions, Wanted),
    "Tensor values, Tensor top1, Tensor kept",
    check=_check,
    kernel=_linear_token_statistics,
    fake=_fake,
    save=_save,
    backward=_backward,
)
