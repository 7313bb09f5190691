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

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.dispatch.transfer import sent
from wrpo_kernels.linear_token_logp.passes import chunks
from wrpo_kernels.lm_head.budget import even_chunk
from wrpo_kernels.lm_head.gradients import Gradients
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.rows import Rows, part_of
from wrpo_kernels.preference_loss.family import Family


class Sequences(NamedTuple):
    """What the loss knows of each sequence, in the order of the op: S sequences in G groups."""

    ref_logp: Tensor | None  # [S]
    seq_weight: Tensor  # [S]
    group: Tensor  # [S] int64
    length: Tensor  # [S] int64, counted rows
    nll_weight: Tensor | None  # [S]
    group_weight: Tensor | None  # [G]

    def none(self) -> Sequences:
        """No sequences, all groups."""
        return Sequences(*(None if x is None else x[:0] for x in self[:5]), self.group_weight)

    def of(self, chosen: Tensor, groups: Tensor, local: Tensor) -> Sequences:
        """The `chosen` sequences, which are those of whole `groups`; `local` are their groups numbered anew."""
        part = Sequences(*(None if x is None else x[chosen] for x in self[:5]), None)
        weight = None if self.group_weight is None else self.group_weight[groups]
        return part._replace(group=local, group_weight=weight)


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
    head: Head,
    rows: Rows,
    sequences: Sequences,
    num_groups: int,
    family: Family,
    divisor: int,
    fit: int,
    gradients: Gradients,
    kernel: ModuleType,
) -> Result:
    """Adds the gradients of the summed loss over `divisor` to `gradients`; returns the values."""
    buffer = head.weight.new_empty(min(fit, len(rows)), len(head.weight))
    if len(rows) <= fit:
        return _finish(head, rows, sequences, num_groups, family, divisor, buffer, gradients, kernel)
    logp = torch.zeros(len(sequences.length), dtype=head.logp_dtype, device=buffer.device)
    # A group that no sequence belongs to has the margin -gamma, whichever way it is computed.
    loss, _, margin, _ = kernel.forward(logp[:0], *sequences.none(), num_groups, family)
    reward = torch.zeros_like(logp)
    # The one place that waits for an accelerator: which rows share a pass depends on the lengths.
    length, group = torch.stack([sequences.length, sequences.group]).tolist()
    of_sequence = rows.positions().split(length)
    for members in passes_of_groups(length, group, num_groups, fit):
        some = rows.at(torch.cat([of_sequence[s] for s in members]))
        numbers = sorted({group[s] for s in members})
        chosen, groups = (sent(values, torch.int64, buffer.device) for values in (members, numbers))
        local = {g: number for number, g in enumerate(numbers)}
        part = sequences.of(chosen, groups, sent([local[group[s]] for s in members], torch.int64, buffer.device))
        values = _finish(head, some, part, len(groups), family, divisor, buffer, gradients, kernel)
        logp[chosen], reward[chosen] = values.logp, values.reward
        loss[groups], margin[groups] = values.loss, values.margin
    return Result(loss.sum() / divisor, loss, logp, reward, margin)


def _finish(
    head: Head,
    rows: Rows,
    sequences: Sequences,
    num_groups: int,
    family: Family,
    divisor: int,
    buffer: Tensor,
    gradients: Gradients,
    kernel: ModuleType,
) -> Result:
    """Values and gradients of whole groups, whose rows come sequence after sequence."""
    number = len(rows)
    token_logp = torch.empty(number, dtype=head.logp_dtype, device=buffer.device)
    pieces = _pieces(number, buffer.shape[0])
    for first, last in pieces[:-1]:
        head.logp_into(token_logp[first:last], rows, first, last, buffer)
    for first, last in pieces[-1:]:
        delta = head.delta_into(part_of(token_logp, first, last), rows, first, last, buffer)
    result, coef = _result_of(token_logp, sequences, num_groups, family, divisor, kernel)
    for first, last in reversed(pieces):
        if last < number:
            delta = head.delta_into(token_logp[first:last], rows, first, last, buffer)
        gradients.add(rows, first, delta, part_of(coef, first, last))
    return result


def _pieces(number: int, fit: int) -> list[tuple[int, int]]:
    """Bounds of `number` rows in pieces of at most `fit`, the last as large as possible: it alone is not recomputed."""
    if number <= fit:
        return [(0, number)] if number else []
    before = number - fit
    return [*chunks(0, before, even_chunk(before, fit)), (before, number)]


def _result_of(
    token_logp: Tensor, sequences: Sequences, num_groups: int, family: Family, divisor: int, kernel: ModuleType
) -> tuple[Result, Tensor]:
    """The values, and coef [N, 1] = d total / d token_logp; a backend may make them in one call."""
    if hasattr(kernel, "of_rows"):
        *values, coef = kernel.of_rows(token_logp, *sequences, num_groups, family, divisor)
        return Result(*values), coef
    logp = kernel.sequence_sum(token_logp, sequences.length)
    loss, reward, margin, coef = kernel.forward(logp, *sequences, num_groups, family)
    coef = kernel.over_rows(coef / divisor, sequences.length, len(token_logp))
    return Result(loss.sum() / divisor, loss, logp, reward, margin), coef[:, None]
