"""The passes of `linear_token_logp` over chunks of rows (N rows that count, D hidden, V vocabulary).

    nothing needs a gradient     2NDV   logits of a chunk -> log-probs, and the buffer is used again
    only the hidden states do    4NDV   ... -> delta -> delta W, kept as [N, D]; the upstream gradient scales rows later
    the head or an adapter does  6NDV   delta of the rows that fit the budget is kept for the backward;
                                 8NDV   the others are recomputed there

A frozen head with an adapter of rank r spares the 2NDV of dW; the adapter adds 2NrV to each computation of the logits
and for each of its own gradients.
No pass needs the upstream gradient before the backward: it enters as one factor a row.
"""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.lm_head.budget import Plan
from wrpo_kernels.lm_head.column_filter import columns_that_count, grad_hidden_into
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.rows import Rows


def chunks(first: int, last: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, last)) for start in range(first, last, max(step, 1))]


def forward(head: Head, rows: Rows, plan: Plan, unscaled: Tensor, kept: Tensor, grad_filter: float = 0.0) -> Tensor:
    """Returns logp [N]; writes the gradient of the hidden states into the first N rows of `unscaled` [>= N, D], unless
    that has none, and the deltas of the first rows into `kept` [keep, >= V]."""
    weight, keeps_hidden = head.weight, len(unscaled) > 0
    logp = weight.new_empty(len(rows), dtype=head.logp_dtype)
    if head.is_fused and not plan.keep and not keeps_hidden:
        head.logp_of(rows, logp)
        return logp
    first_chunk, kept = min(plan.keep, len(rows)), kept[:, : len(weight)]
    if first_chunk and head.writes_in_place:
        head.delta_into(logp[:first_chunk], rows, 0, first_chunk, kept)
    made = first_chunk if head.writes_in_place else 0  # deltas that are kept already
    buffer = head.buffer(min(plan.chunk, len(rows) - made))
    for first, last in (*chunks(made, first_chunk, plan.chunk), *chunks(first_chunk, len(rows), plan.chunk)):
        if first < first_chunk:
            head.delta_into(logp[first:last], rows, first, last, buffer, kept[first:last])
        elif keeps_hidden:
            delta = head.delta_into(logp[first:last], rows, first, last, buffer)
            columns = columns_that_count(delta, rows.target[first:last], grad_filter)
            grad_hidden_into(unscaled[first:last], delta, weight, columns)
        else:
            head.logp_into(logp[first:last], rows, first, last, buffer)
    return logp


def backward(
    head: Head, rows: Rows, plan: Plan, kept: Tensor, coef: Tensor, logp: Tensor, gradients: Gradients
) -> None:
    """Adds the gradients of the rows, each scaled by its `coef` [N, 1], from their kept or recomputed deltas; `logp`
    [N] is what the forward returned."""
    coef = head.coefficients(coef, logp)
    first_chunk = min(plan.keep, len(rows))
    if first_chunk:
        gradients.add(rows, 0, kept[:first_chunk, : len(head.weight)], coef[:first_chunk])
    buffer = head.buffer(min(plan.chunk, len(rows) - first_chunk))
    for first, last in chunks(first_chunk, len(rows), plan.chunk):
        delta = head.delta_into(coef.new_empty(last - first), rows, first, last, buffer)
        gradients.add(rows, first, delta, coef[first:last])
