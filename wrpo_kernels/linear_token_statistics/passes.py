"""The passes of `linear_token_statistics` over chunks of rows.

    nothing needs a gradient   2NDV   logits of a chunk -> statistics, and the buffer is used again
    the head does              6NDV   logits of the rows that fit the budget are kept for the backward;
                               8NDV   the others are made again there. A frozen head spares the 2NDV of dW.

Which combination of the statistics the loss is made of is known in the backward alone, so logits are kept and not, as
for log-probs, their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.linear_token_logp.passes import chunks
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.lm_head.budget import Plan, even_chunk, logits_buffer
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.products import logits_into
from wrpo_kernels.lm_head.rows import Rows, slice_rows


def plan_rows(num_rows: int, fit: int, kept_fit: int, is_trained: bool, tile: int) -> Plan:
    """Three quarters of the budget keep logits and one quarter is worked in; without a backward all of it is.

    fit, kept_fit: rows that fill the budget while they are worked on, and as they are kept.
    """
    if not is_trained:
        return Plan(0, even_chunk(num_rows, fit, tile) if num_rows else 1)
    work = max(1, fit // 4)
    return Plan(min(num_rows, kept_fit * (fit - work) // fit), work)


def forward(head: Head, rows: Rows, plan: Plan, kept: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Returns values [N, 6] and top1 [N]; leaves the logits of the first rows in `kept` [keep, V]."""
    number, weight = len(rows), head.weight
    values = weight.new_empty(number, len(COLUMNS), dtype=head.logp_dtype)
    top1 = torch.empty(number, dtype=torch.int64, device=weight.device)
    first_chunk = min(plan.keep, number)
    buffer = logits_buffer(weight, min(plan.chunk, number - first_chunk), len(weight), kept.dtype)
    pieces = [(0, first_chunk, kept)] if first_chunk else []
    pieces += [(first, last, buffer) for first, last in chunks(first_chunk, number, plan.chunk)]
    for first, last, out in pieces:
        logits = _logits(head, rows, first, last, out)
        told = (rows.target[first:last], head.ignore_index, head.transform, wanted)
        head.kernel.statistics(logits, *told, values[first:last], top1[first:last])
    return values, top1


def backward(
    head: Head,
    rows: Rows,
    plan: Plan,
    kept: Tensor,
    values: Tensor,
    coef: Tensor,
    gradients: Gradients,
    wanted: Wanted,
) -> None:
    """Adds the gradients of the rows from their kept or newly made logits; coef [N, 6] is d loss / d values."""
    number = len(rows)
    # One factor a row stays out of the gradients of its logits: 16 bits would lose the small ones.
    size = coef.abs().amax(1, keepdim=True)
    size = size.where(size > 0, 1.0)
    coef = coef / size
    buffer = logits_buffer(kept, min(plan.chunk, number), kept.shape[1])
    first_chunk = min(plan.keep, number)
    for first, last in (*chunks(0, first_chunk, plan.chunk), *chunks(first_chunk, number, plan.chunk)):
        logits = buffer[: last - first]
        if first < first_chunk:
            logits.copy_(kept[first:last])
        else:
            _logits(head, rows, first, last, logits)
        told = (rows.target[first:last], head.ignore_index, head.transform, wanted)
        head.kernel.grad_(logits, *told, values[first:last], coef[first:last])
        gradients.add(rows, first, head.narrowed(logits, len(buffer)), size[first:last])


def _logits(head: Head, rows: Rows, first: int, last: int, buffer: Tensor) -> Tensor:
    out = slice_rows(buffer, 0, last - first)
    return logits_into(out, rows.hidden(first, last), head.weight, rows.low(first, last), head.up)
