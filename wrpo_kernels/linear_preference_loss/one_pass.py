"""Loss and gradients in one pass of 6NDV flops: for a head that is trained, itself or by an adapter, and whose rows do
not fit the budget, or for a small one.

The coefficient of a row depends on the log-probs of its own group only. So whole groups are taken as the budget
allows, and each is finished before the next one starts:

    logits of the groups' rows -> log-probs and delta -> sequence sums -> margins -> one coefficient a sequence
                               -> dh = c (delta W), dW += delta^T (c h), of an adapter dlow and dup likewise

A group that is larger than the budget is taken in pieces: `passes` says in which of three ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import Backend
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.linear_preference_loss.passes import facts_of, plan_passes, room_of, rows_of_a_total
from wrpo_kernels.linear_token_logp.passes import chunks
from wrpo_kernels.lm_head.budget import even_chunk, row_tile
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


class Limits(NamedTuple):
    """Numbers of rows: of a call that goes at once, of what passes together where it need not, and what the budget
    holds."""

    at_once: int
    together: int
    fit: int


class GroupPass:
    """One pass after the other over the rows of whole groups: their values returned, their gradients added.

    Attributes:
        buffer: [rows at a time, V] of logits.
        pending: [] what the gradients of the head are still to be multiplied by; None: nothing.
    """

    buffer: Tensor

    def __init__(self, head: Head, divisor: int, gradients: Gradients, kernel: Backend) -> None:
        self.pending: Tensor | None = None
        self._head, self._divisor, self._gradients, self._kernel = head, divisor, gradients, kernel

    def make_room(self, number: int) -> None:
        self.buffer = self._head.buffer(number)

    def walk(self, way: str, rows: Rows, loss: LossArguments, is_alone: bool) -> Result:
        return self.scaled(rows, loss, is_alone) if way == "scaled" else getattr(self, way)(rows, loss)

    def whole(self, rows: Rows, loss: LossArguments) -> Result:
        """Rows that fit the buffer together."""
        number = len(rows)
        token_logp = self._head.weight.new_empty(number, dtype=self._head.logp_dtype)
        if number:
            delta = self._head.delta_into(token_logp, rows, 0, number, self.buffer)
        result, coef = self._values_and_coefficients(token_logp, loss)
        if number:
            self._gradients.add(rows, 0, delta, self._head.coefficients(coef, token_logp))
        return result

    def known(self, rows: Rows, loss: LossArguments) -> Result:
        """No log-prob counts in a margin, so that the coefficients are there before any of them."""
        token_logp, coef, last_piece = self._walk(rows, self._likelihood_share, loss, self._gradients)
        self._add(self._gradients, rows, *last_piece, coef, token_logp)
        result, _ = self._values_and_coefficients(token_logp, loss)
        return result

    def scaled(self, rows: Rows, loss: LossArguments, is_alone: bool) -> Result:
        """One group, whose coefficients are known but for one factor. The gradients of the last piece take it along
        where they can; elsewhere it is what is left of all of them after the walk."""
        is_first = self._gradients.is_empty
        takes_along = is_first and self._gradients.takes_factor
        gradients = self._gradients if is_first else self._gradients.apart()
        token_logp, coef, last_piece = self._walk(rows, self._margin_share, loss, gradients)
        if not takes_along:
            self._add(gradients, rows, *last_piece, coef, token_logp)
        result, final = self._values_and_coefficients(token_logp, loss)
        largest = coef.abs().argmax(0)  # of any row the same, but for rounding and where it is zero
        own, whole = coef.take(largest), final.take(largest)
        factor = (whole / own).where(own != 0, whole).reshape(())
        of_rows = factor.where(coef != 0, 0.0)
        if takes_along:
            gradients.scale_rows_(rows, of_rows[: last_piece[0]])
            self._add(gradients, rows, *last_piece, final, token_logp, factor.item())
        elif is_alone:
            gradients.scale_rows_(rows, of_rows)
            self.pending = factor
        else:
            self._gradients.take_in_(gradients, rows, factor, of_rows)
        return result

    def twice(self, rows: Rows, loss: LossArguments) -> Result:
        """Log-probs of all pieces, the last of which waits in the buffer; then the gradients, from the last one on."""
        number, buffer = len(rows), self.buffer
        token_logp = buffer.new_empty(number, dtype=self._head.logp_dtype)
        before = number - len(buffer)
        pieces = chunks(0, before, even_chunk(before, len(buffer), row_tile(buffer.device)))
        for first, last in pieces:
            self._head.logp_into(token_logp[first:last], rows, first, last, buffer)
        delta = self._head.delta_into(token_logp[before:], rows, before, number, buffer)
        result, coef = self._values_and_coefficients(token_logp, loss)
        coef = self._head.coefficients(coef, token_logp)
        self._gradients.add(rows, before, delta, coef[before:])
        for first, last in reversed(pieces):
            delta = self._head.delta_into(token_logp[first:last], rows, first, last, buffer)
            self._gradients.add(rows, first, delta, coef[first:last])
        return result

    def _walk(
        self, rows: Rows, share: Callable[[LossArguments], Tensor], loss: LossArguments, gradients: Gradients
    ) -> tuple[Tensor, Tensor, tuple[int, Tensor]]:
        """Adds the gradients with the coefficient share(loss) [S] of each row's sequence, a piece at a time but for the
        last; returns the log-probs [N], the coefficients [N, 1], and the first row and the delta of the last piece."""
        number, coef = len(rows), None
        token_logp = loss.sequences.seq_weight.new_empty(number)
        for first, last in chunks(0, number, even_chunk(number, len(self.buffer), row_tile(token_logp.device))):
            delta = self._head.delta_into(token_logp[first:last], rows, first, last, self.buffer)
            if coef is None:  # behind the first product, which then waits for nothing that is as small
                coef = share(loss).repeat_interleave(loss.sequences.length, output_size=number)[:, None]
            if last < number:
                self._add(gradients, rows, first, delta, coef, token_logp)
        return token_logp, coef, (first, delta)

    def _likelihood_share(self, loss: LossArguments) -> Tensor:
        share = loss.sequences.likelihood_share(loss.family)
        return share if self._divisor == 1 else share / self._divisor

    def _margin_share(self, loss: LossArguments) -> Tensor:
        """Over the largest: weights of any size are walked, and the factor makes up for it."""
        share = loss.sequences.margin_share(loss.family)
        return share / share.abs().max().clamp(min=torch.finfo(share.dtype).tiny)

    def _add(
        self,
        gradients: Gradients,
        rows: Rows,
        first: int,
        delta: Tensor,
        coef: Tensor,
        token_logp: Tensor,
        factor: float = 1.0,
    ) -> None:
        """The gradients of the piece at `first`, of the coefficients [N, 1] of all rows; those of the head beside
        `factor` times what is there."""
        last = first + len(delta)
        some = self._head.coefficients(slice_rows(coef, first, last), token_logp[first:last])
        gradients.add(rows, first, delta, some, factor)

    def _values_and_coefficients(self, token_logp: Tensor, loss: LossArguments) -> tuple[Result, Tensor]:
        """The values, and coef [N, 1] = d total / d token_logp; a backend may make them in one call."""
        kernel, length = self._kernel, loss.sequences.length
        if hasattr(kernel, "of_rows"):
            *values, coef = kernel.of_rows(token_logp, loss, self._divisor)
            return Result(*values), coef
        logp = kernel.sequence_sum(token_logp, length)
        value, reward, margin, coef = kernel.forward(logp, loss)
        coef = kernel.over_rows(coef / self._divisor, length, len(token_logp))
        return Result(value.sum() / self._divisor, value, logp, reward, margin), coef[:, None]


def run(
    head: Head,
    rows: Rows,
    loss: LossArguments,
    on_host: Tensor | None,
    divisor: int,
    limits: Limits,
    gradients: Gradients,
    kernel: Backend,
    has_margin: bool = True,
) -> tuple[Result, Tensor | None]:
    """Adds the gradients of the summed loss over `divisor` to `gradients`; returns the values, and what is left to
    multiply those of the head by, or None. on_host [2, S]: lengths and groups, where the host knows them."""
    passes, device = GroupPass(head, divisor, gradients, kernel), head.weight.device
    if len(rows) <= limits.at_once:
        passes.make_room(len(rows))
        return passes.whole(rows, loss), None
    if not has_margin:
        passes.make_room(min(limits.together, len(rows)))
        return passes.known(rows, loss), None
    sequences, num_groups, family = loss
    facts = facts_of(sequences, on_host)
    check_group_numbers(facts.group, num_groups)
    extra_rows = rows_of_a_total(device) if gradients.dw is not None else 0
    plan = plan_passes(facts, num_groups, limits.together, limits.fit, extra_rows)
    passes.make_room(max(room_of(some, facts, limits.together, limits.fit) for some in plan))
    if len(plan) == 1:  # all rows as they stand
        return passes.walk(plan[0].walk, rows, loss, is_alone=True), passes.pending
    logp = torch.zeros(len(sequences.seq_weight), dtype=head.logp_dtype, device=device)
    value, margin, reward = logp.new_empty(num_groups), logp.new_empty(num_groups), torch.zeros_like(logp)
    of_sequence = rows.positions().split(facts.length)
    for members, walk in plan:
        some = rows.at(torch.cat([of_sequence[s] for s in members]))
        numbers = sorted({facts.group[s] for s in members})
        local = {g: number for number, g in enumerate(numbers)}
        renumbered = [local[facts.group[s]] for s in members]
        sent = to_device(members + renumbered + numbers, torch.int64, device)
        chosen, group, groups = sent.split([len(members), len(members), len(numbers)])
        part = LossArguments(sequences.at(chosen, groups, group), len(numbers), family)
        values = passes.walk(walk, some, part, is_alone=False)
        logp[chosen], reward[chosen] = values.logp, values.reward
        value[groups], margin[groups] = values.loss, values.margin
    return Result(value.sum() / divisor, value, logp, reward, margin), passes.pending
