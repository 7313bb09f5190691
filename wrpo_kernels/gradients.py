"""The gradients of a head, added up from one chunk of rows after the other.

    dh_t = c_t (delta_t W)          dW = sum_t delta_t^T (c_t h_t)          db = sum_t c_t delta_t

`c_t` is the one number that a row knows of the loss; it scales rows of h and of dh, never the [n, V] delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels import column_filter
from wrpo_kernels.products import add_grad_weight, grad_weight_into, scale_rows_, scaled_rows, stripe_of, writes_float32
from wrpo_kernels.rows import Rows
from wrpo_kernels.scratch import scratch


class Gradients:
    """dh [..., D], dW [V, D] and db [V]; each None unless its flag in `keeps` is set.

    One chunk of dW is summed in float32 inside the product and rounded once; several are added up in a float32 total.
    With a `grad_filter` dh and dW leave out what `column_filter` says.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, keeps: tuple[bool, bool, bool], chunks: int, grad_filter: float = 0.0
    ) -> None:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.dh = hidden.new_empty(hidden.shape) if keeps[0] else None
        self.dw = self.db = None
        if keeps[1]:
            dtype = weight.dtype if chunks <= 1 else wide
            self.dw = scratch(weight.shape[0], weight.shape[1], dtype, weight.device)
        if keeps[2]:
            self.db = torch.zeros(weight.shape[0], dtype=wide, device=weight.device)
        self._weight = weight
        self._filter = grad_filter
        self._is_empty = True

    def add(self, rows: Rows, first: int, delta: Tensor, coef: Tensor) -> None:
        """The share of rows [first, first + n): delta [n, V], coef [n, 1]."""
        last = first + delta.shape[0]
        columns = None
        if self._filter:
            columns = column_filter.columns_that_count(delta, rows.target[first:last], self._filter)
        if self.dh is not None:
            dh = self.dh.view(-1, self.dh.shape[-1])
            if self._is_empty and rows.index is not None:
                dh.zero_()
            share = rows.room_in(dh, first, last)
            column_filter.grad_hidden_into(share, delta, self._weight, columns)
            rows.put_(dh, first, scale_rows_(share, coef))
        if self.dw is not None:
            self._add_weight(delta, scaled_rows(rows.hidden(first, last), coef), columns)
        if self.db is not None:
            self._add_bias(delta, coef)
        self._is_empty = False

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dh, dW and db as they were accumulated."""
        for total in (self.dh, self.dw):
            if self._is_empty and total is not None:
                total.zero_()
        return self.dh, self.dw, self.db

    def _add_weight(self, delta: Tensor, scaled: Tensor, columns: Tensor | None) -> None:
        if columns is not None:
            if self._is_empty:
                self.dw.zero_()
            column_filter.add_grad_weight(self.dw, delta, scaled, columns)
        elif self.dw.dtype != delta.dtype and writes_float32(delta):
            add_grad_weight(self.dw, delta, scaled, first=self._is_empty)
        elif self.dw.dtype != delta.dtype:
            self._widen_in_stripes(delta, scaled)
        elif self._is_empty:
            grad_weight_into(self.dw, delta, scaled)
        else:
            self.dw.addmm_(delta.t(), scaled)

    def _widen_in_stripes(self, delta: Tensor, scaled: Tensor) -> None:
        """Where a product of 16-bit matrices cannot write float32: a stripe of the vocabulary at a time is widened."""
        vocabulary, width = self.dw.shape
        step = stripe_of(width, delta.dtype)
        part = scratch(min(step, vocabulary), width, delta.dtype, delta.device)
        for first in range(0, vocabulary, step):
            total = self.dw[first : first + step]
            grad_weight_into(part[: len(total)], delta[:, first : first + step], scaled)
            total.copy_(part[: len(total)]) if self._is_empty else total.add_(part[: len(total)])

    def _add_bias(self, delta: Tensor, coef: Tensor) -> None:
        step = stripe_of(len(delta), self.db.dtype)
        for first in range(0, delta.shape[1], step):
            part = delta[:, first : first + step].to(self.db.dtype)
            self.db[first : first + step] += (coef.to(part.dtype).t() @ part)[0]
