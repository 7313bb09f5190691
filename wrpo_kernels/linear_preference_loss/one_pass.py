"""Loss and gradients in one pass of 6NDV flops: for a head that is trained, itself or by an adapter, and whose rows do
not fit the budget, or for a small one.

The coefficient of a row depends on the log-probs of its own group only. So whole groups are taken as the budget
allows, and each is finished before the next one starts:

    logits of the groups' rows -> log-probs and delta -> sequence sums -> margins -> one coefficient a sequence
                               -> dh = c (delta W), dW += delta^T (c h), of an adapter dlow and dup likewise

A group that is larger than the budget is taken in pieces. The last one fills the budget and waits there for the
coefficients; the rows of the others are recomputed once (2DV a row).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import Backend
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.linear_token_logp.passes import chunks
from wrpo_kernels.lm_head.budget import even_chunk
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.rows import Rows, slice_rows
from wrpo_kernels.preference_loss.contract import check_group_numbers
from wrpo_kernels.preference_loss.family import LossArguments


class Result(NamedTuple):
    total: Tensor  # [], the sum of loss over the divisor
    loss: Tensor  # [G]
    logp: Tensor  # [S]
    reward: Tensor  # [S]
    margin: Tensor  # [G]


def passes_of_groups(length: list[int], group: list[int], num_groups: int, fit: int) -> list[list[int]]:
    """Sequences of each pass: whole groups in order, as many as have at most `fit` rows together, at least one."""
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for sequence, g in enumerate(group):
        members[g].append(sequence)
    passes: list[list[int]] = []
    room = -1
    for sequences in members:
        rows = sum(length[s] for s in sequences)
        if rows > room or not passes:
            passes.append([])
            room = fit
        passes[-1] += sequences
        room -= rows
    return [sequences for sequences in passes if sequences]


def run(
    head: Head, rows: Rows, loss: LossArguments, divisor: int, fit: int, gradients: Gradients, kernel: Backend
) -> Result:
    """Adds the gradients of the summed loss over `divisor` to `gradients`; returns the values."""
    buffer = head.weight.new_empty(min(fit, len(rows)), len(head.weight))
    if len(rows) <= fit:
        return _values_and_gradients(head, rows, loss, divisor, buffer, gradients, kernel)
    sequences, num_groups, family = loss
    logp = torch.zeros(len(sequences.seq_weight), dtype=head.logp_dtype, device=buffer.device)
    value, margin, reward = logp.new_empty(num_groups), logp.new_empty(num_groups), torch.zeros_like(logp)
    # The one place that waits for an accelerator: which rows share a pass depends on the lengths.
    length, group = torch.stack([sequences.length, sequences.group]).tolist()
    check_group_numbers(group, num_groups)
    of_sequence = rows.positions().split(length)
    for members in passes_of_groups(length, group, num_groups, fit):
        some = rows.at(torch.cat([of_sequence[s] for s in members]))
        numbers = sorted({group[s] for s in members})
        chosen, groups = (to_device(values, torch.int64, buffer.device) for values in (members, numbers))
        local = {g: number for number, g in enumerate(numbers)}
        renumbered = to_device([local[group[s]] for s in members], torch.int64, buffer.device)
        part = LossArguments(sequences.at(chosen, groups, renumbered), len(numbers), family)
        values = _values_and_gradients(head, some, part, divisor, buffer, gradients, kernel)
        logp[chosen], reward[chosen] = values.logp, values.reward
        value[groups], margin[groups] = values.loss, values.margin
    return Result(value.sum() / divisor, value, logp, reward, margin)


def _values_and_gradients(
    head: Head, rows: Rows, loss: LossArguments, divisor: int, buffer: Tensor, gradients: Gradients, kernel: Backend
) -> Result:
    """Of whole groups, whose rows come sequence after sequence."""
    number = len(rows)
    token_logp = torch.empty(number, dtype=head.logp_dtype, device=buffer.device)
    pieces = _pieces(number, buffer.shape[0])
    for first, last in pieces[:-1]:
        head.logp_into(token_logp[first:last], rows, first, last, buffer)
    for first, last in pieces[-1:]:
        delta = head.delta_into(slice_rows(token_logp, first, last), rows, first, last, buffer)
    result, coef = _values_and_coefficients(token_logp, loss, divisor, kernel)
    for first, last in reversed(pieces):
        if last < number:
            delta = head.delta_into(token_logp[first:last], rows, first, last, buffer)
        gradients.add(rows, first, delta, slice_rows(coef, first, last))
    return result


def _pieces(number: int, fit: int) -> list[tuple[int, int]]:
    """Bounds of `number` rows in pieces of at most `fit`, the last as large as possible: it alone is not recomputed."""
    if number <= fit:
        return [(0, number)] if number else []
    before = number - fit
    return [*chunks(0, before, even_chunk(before, fit)), (before, number)]


def _values_and_coefficients(
    token_logp: Tensor, loss: LossArguments, divisor: int, kernel: Backend
) -> tuple[Result, Tensor]:
    """The values, and coef [N, 1] = d total / d token_logp; a backend may make them in one call."""
    if hasattr(kernel, "of_rows"):
        *values, coef = kernel.of_rows(token_logp, loss, divisor)
        return Result(*values), coef
    length = loss.sequences.length
    logp = kernel.sequence_sum(token_logp, length)
    value, reward, margin, coef = kernel.forward(logp, loss)
    coef = kernel.over_rows(coef / divisor, length, len(token_logp))
    return Result(value.sum() / divisor, value, logp, reward, margin), coef[:, None]
