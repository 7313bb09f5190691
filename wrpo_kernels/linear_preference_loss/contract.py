"""The registered op `wrpo::linear_preference_loss`, of the one-pass form: its schema, kernel, fake and derivative.

The op returns the sum or the mean of the losses of all groups together with its gradients, so that the backward only
scales them: by the upstream gradient, and those of the head by `factor` where the rows did not fit the budget together.
Rows that did may take another way: see the public function. Without a margin (`has_margin`) the loss is the likelihood
term alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_device, check_shape, check_tensor
from wrpo_kernels.dispatch.autograd import owns_saved, register, register_differentiable
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.dispatch.schema import Arguments
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.linear_preference_loss import at_once, one_pass
from wrpo_kernels.linear_token_logp.contract import rows_of
from wrpo_kernels.lm_head import scaling
from wrpo_kernels.lm_head.budget import rows_before_pieces, rows_in_passing, rows_within
from wrpo_kernels.lm_head.exp_product.form import ExpProduct
from wrpo_kernels.lm_head.gradients import Gradients, total_dtype
from wrpo_kernels.lm_head.head import Head, LabelsByPosition, no_autocast
from wrpo_kernels.lm_head.inputs import HeadGradients, HeadOptions, HeadTensors, check_head
from wrpo_kernels.lm_head.rows import most_rows
from wrpo_kernels.preference_loss import contract as preference
from wrpo_kernels.preference_loss.family import Family, LossArguments, Sequences
from wrpo_kernels.token_logp.contract import logp_dtype

CANDIDATES = (*preference.CANDIDATES, ExpProduct())  # fewer than linear_token_logp has


def _linear_preference_loss(
    tensors: HeadTensors,
    sequences: Sequences,
    on_host: Tensor | None,
    options: HeadOptions,
    num_groups: int,
    family: Family,
    averages: bool,
    has_margin: bool,
) -> tuple[Tensor | None, ...]:
    preference.check_groups(sequences.group, num_groups)
    sequences = preference.in_dtype(logp_dtype(tensors.hidden.dtype), sequences)
    divisor = max(num_groups, 1) if averages else 1
    limits, chunks = _limits_and_chunks(tensors, options)
    loss = LossArguments(sequences, num_groups, family)
    with no_autocast(tensors.hidden), LabelsByPosition("labels", tensors, options.ignore_index):
        rows = rows_of(tensors, options)
        if chunks == 1 and len(rows) and at_once.takes(tensors, options):
            values, grads = at_once.run(tensors, rows, options, loss, divisor)
            return *values, None, *grads
        head = Head(tensors, options)
        gradients = Gradients(tensors.hidden, head, options.asked, chunks, options.grad_filter)
        kernel = choose(loss_backend(options.backend), preference.CANDIDATES, sequences.seq_weight)
        result, factor = one_pass.run(head, rows, loss, on_host, divisor, limits, gradients, kernel, has_margin)
        if factor is None and chunks > 1:
            factor = torch.ones_like(result.total)
        return result.total, result.logp, result.reward, result.margin, factor, *gradients.totals()


def _check(
    tensors: HeadTensors,
    sequences: Sequences,
    on_host: Tensor | None,
    options: HeadOptions,
    num_groups: int,
    family: Family,
    averages: bool,
    has_margin: bool,
) -> None:
    check_head(tensors, options)
    if sequences.length is None or sequences.length.dim() != 1:
        raise ValueError("length must be [S], the number of counted rows of each sequence")
    check_device("length", sequences.length, "hidden", tensors.hidden.device)
    if on_host is not None:
        check_shape("on_host", on_host, "[2, S], lengths and groups", 2, sequences.length.shape[0])
        check_device("on_host", on_host, "the host", torch.device("cpu"))
    preference.check(sequences.length, LossArguments(sequences, num_groups, family))


def loss_backend(name: str | None) -> str | None:
    """The backend of the loss itself beside that of the head: it has no product, so "triton" for "triton_exp"."""
    return TritonBackend.NAME if name == ExpProduct.NAME else name


def _limits_and_chunks(tensors: HeadTensors, options: HeadOptions) -> tuple[one_pass.Limits, int]:
    """With the number of chunks in which the gradients are added up: two stand for any number."""
    sizes = (options.budget_bytes, tensors.hidden, tensors.weight, tensors.up)
    logit_bytes = options.logit_bytes(tensors.hidden)
    at_once = rows_before_pieces(*sizes, options.asked.weight, logit_bytes)
    if most_rows(options.num_rows, tensors.target) <= at_once:
        return one_pass.Limits(at_once, at_once, at_once), 1
    fit = rows_within(*sizes, logit_bytes)
    return one_pass.Limits(min(at_once, fit), rows_in_passing(*sizes, logit_bytes), fit), 2


def _fake(
    tensors: HeadTensors,
    sequences: Sequences,
    on_host: Tensor | None,
    options: HeadOptions,
    num_groups: int,
    family: Family,
    averages: bool,
    has_margin: bool,
) -> tuple[Tensor, ...]:
    hidden, weight, _, *rest = tensors
    wide, (_, chunks) = logp_dtype(hidden.dtype), _limits_and_chunks(tensors, options)
    dw, dup = (None if x is None else total_dtype(hidden.dtype, x.dtype, chunks) for x in (weight, tensors.up))
    logp = hidden.new_empty(sequences.seq_weight.shape[0], dtype=wide)
    kinds = HeadGradients(hidden.dtype, dw, wide, hidden.dtype, dup)
    each = zip(options.asked, (hidden, weight, *rest), kinds, strict=True)
    grads = [hidden.new_empty(x.shape, dtype=kind) if asked else hidden.new_empty(0) for asked, x, kind in each]
    factor = logp.new_empty(()) if chunks > 1 else hidden.new_empty(0)
    return logp.new_empty(()), logp, torch.empty_like(logp), logp.new_empty(num_groups), factor, *grads


def _save(
    ctx: Any,
    outputs: tuple[Tensor | None, ...],
    tensors: HeadTensors,
    sequences: Sequences,
    on_host: Tensor | None,
    options: HeadOptions,
    *_: Any,
) -> None:
    hidden, weight, _target, *rest = tensors
    _loss, logp, reward, margin, factor, *totals = outputs
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, *rest)]
    ctx.asked = options.asked
    constants = (logp, reward, margin, factor, *totals)
    ctx.mark_non_differentiable(*[x for x in constants if x is not None])
    ctx.save_for_backward(factor, *totals)


def _backward(ctx: Any, grad_loss: Tensor, *_: None) -> dict[str, Tensor]:
    scaled = _scaled_in_place if owns_saved(ctx) else scaled_to
    factor, *totals = ctx.saved_tensors
    has_factor = factor is not None and factor.dim() == 0
    of_head = grad_loss * factor if has_factor else grad_loss
    by = HeadGradients(hidden=grad_loss, weight=of_head, bias=of_head, low=grad_loss, up=of_head)
    each = zip(by._asdict().items(), ctx.asked, totals, ctx.dtypes, strict=True)
    return {name: scaled(total, number, dtype) for (name, number), asked, total, dtype in each if asked}


def _scaled_in_place(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return scaling.scaled_in_place(total, factor) if total.dtype == dtype else scaled_to(total, factor, dtype)


def check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor) -> None:
    _check_bounds(cu_seqlens, labels.numel())
    if labels.dim() != 1:
        raise ValueError(f"with cu_seqlens, labels must be packed [N], got {list(labels.shape)}")


def _checked_cu_seqlens(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The bounds as int64; an op, so that compiled code too looks at the values before a kernel follows them."""
    if cu_seqlens.device.type == "cpu":  # elsewhere reading them would wait for the device
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != num_rows or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to N={num_rows}, got {bounds}")
    return cu_seqlens.to(torch.int64, copy=True)


def _check_bounds(cu_seqlens: Tensor, num_rows: int) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be [S+1] int32 or int64, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")


def _check_factor(total: Tensor, factor: Tensor, dtype: torch.dtype) -> None:
    check_shape("factor", factor, "[]")


def are_bounds(bounds: Tensor, num_rows: int) -> Tensor:
    """[] bool, what `checked_cu_seqlens` checks, without reading it."""
    return (bounds[0] == 0) & (bounds[-1] == num_rows) & (bounds.diff() >= 0).all()


checked_cu_seqlens = register(
    "checked_cu_seqlens",
    Arguments("Tensor cu_seqlens", "SymInt num_rows"),
    "Tensor",
    check=_check_bounds,
    kernel=_checked_cu_seqlens,
    fake=lambda cu_seqlens, num_rows: torch.empty_like(cu_seqlens, dtype=torch.int64),
)
scaled_to = register(
    "scaled_to",
    Arguments("Tensor total", "Tensor factor", "ScalarType dtype"),
    "Tensor",
    check=_check_factor,
    kernel=scaling.scaled,
    fake=lambda total, factor, dtype: torch.empty_like(total, dtype=dtype),
)
linear_preference_loss = register_differentiable(
    "linear_preference_loss",
    Arguments(
        HeadTensors,
        Sequences,
        "Tensor? on_host",
        HeadOptions,
        "SymInt num_groups",
        Family,
        "bool averages",
        "bool has_margin",
    ),
    "Tensor loss, Tensor logp, Tensor reward, Tensor margin, Tensor factor, "
    "Tensor dh, Tensor dw, Tensor db, Tensor dlow, Tensor dup",
    check=_check,
    kernel=_linear_preference_loss,
    fake=_fake,
    save=_save,
    backward=_backward,
)
