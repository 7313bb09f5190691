"""The gradients of a head, added up from one chunk of rows after the other.

    dh_t = c_t (delta_t W)          dW = sum_t delta_t^T (c_t h_t)          db = sum_t c_t delta_t

`c_t` is the one number that a row knows of the loss; it scales rows of h and of dh, never the [n, V] delta. The
low [N, r] and up [V, r] of an adapter are to each other what h and W are.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.lm_head import column_filter
from wrpo_kernels.lm_head.head import Head
from wrpo_kernels.lm_head.inputs import Asked, HeadGradients
from wrpo_kernels.lm_head.products import (
    add_grad_weight,
    grad_weight_into,
    product_into,
    scaled_rows,
    stripe_of,
    writes_float32,
)
from wrpo_kernels.lm_head.rows import Rows
from wrpo_kernels.token_logp.contract import logp_dtype


def total_dtype(products: torch.dtype, wanted: torch.dtype, chunks: int) -> torch.dtype:
    """Of a sum over rows, which is handed out as `wanted`: no wider than that takes while one product is all of it."""
    return products if chunks <= 1 and wanted.itemsize <= products.itemsize else logp_dtype(products)


class Gradients:
    """dh [..., D], dW [V, D], db [V], dlow [..., r] and dup [V, r]; each None unless it is asked for.

    One chunk of dW is summed inside the product, in float32 but for what `linear_token_logp` says of GPUs, and rounded
    once, where its tensor has the type of the products; several are added up in a float32 total, and so is what belongs
    to a float32 head of 16-bit products.
    With a `grad_filter` dh and dW leave out what `column_filter` says.
    """

    def __init__(self, hidden: Tensor, head: Head, asked: Asked, chunks: int, grad_filter: float = 0.0) -> None:
        weight, up, products = head.weight, head.up, hidden.dtype
        self.dh = in_huge_pages(hidden.new_empty(hidden.shape)) if asked.hidden else None
        self.dw = self.db = self.dlow = self.dup = None
        if asked.weight:
            dtype = total_dtype(products, head.weight_dtype, chunks)
            self.dw = in_huge_pages(weight.new_empty(weight.shape, dtype=dtype))
        if asked.bias:
            self.db = torch.zeros(weight.shape[0], dtype=logp_dtype(products), device=weight.device)
        if asked.low:
            self.dlow = in_huge_pages(hidden.new_empty(*hidden.shape[:-1], up.shape[1]))
        if asked.up:
            dtype = total_dtype(products, head.up_dtype, chunks)
            self.dup = in_huge_pages(up.new_empty(up.shape, dtype=dtype))
        self._weight, self._up = weight, up
        self._filter = grad_filter
        self.is_empty = True  # nothing is in the totals of the head
        self._has_rows = False  # dh and dlow are zero where no row has come

    @property
    def takes_factor(self) -> bool:
        """Whether `add` multiplies a dW for nothing: in the product of a CPU, which knows the number. Totals in float32
        of 16-bit products are scaled where they are cast to the type of their tensor."""
        return self._weight.is_cpu and self._weight.dtype.itemsize > 2

    def add(self, rows: Rows, first: int, delta: Tensor, coef: Tensor, factor: float = 1.0) -> None:
        """The share of rows [first, first + n): delta [n, V], coef [n, 1]; to dW, db and dup beside `factor` times what
        is there."""
        last = first + delta.shape[0]
        columns = None
        if self._filter and not (self.dh is self.dw is None):
            columns = column_filter.columns_that_count(delta, rows.target[first:last], self._filter)
        if self.dh is not None:
            self._put_rows(self.dh, rows, first, delta, coef, self._weight, columns)
        if self.dw is not None:
            self._add_weight(self.dw, delta, rows.hidden(first, last, coef), columns, factor)
        if self.db is not None:
            self._add_bias(delta, coef, factor)
        if self.dlow is not None:
            self._put_rows(self.dlow, rows, first, delta, coef, self._up, None)
        if self.dup is not None:
            self._add_weight(self.dup, delta, scaled_rows(rows.low(first, last), coef), None, factor)
        self.is_empty = False
        self._has_rows = True

    def apart(self) -> Gradients:
        """The same dh and dlow, and dW, db and dup of their own."""
        other = copy(self)
        other.dw, other.dup = (None if x is None else in_huge_pages(torch.empty_like(x)) for x in (self.dw, self.dup))
        other.db = None if self.db is None else torch.zeros_like(self.db)
        other.is_empty = True
        return other

    def take_in_(self, other: Gradients, rows: Rows, factor: Tensor, of_rows: Tensor) -> None:
        """factor [] times what `other` has of these rows, and nothing else is in `other`: self, or `apart` from it.
        of_rows [N, 1]: the factor, 0 where a row has no coefficient."""
        for total, share in ((self.dw, other.dw), (self.db, other.db), (self.dup, other.dup)):
            if total is share is not None:
                total.mul_(factor)
            elif total is not None:
                total.addcmul_(share, factor)
        self.scale_rows_(rows, of_rows)

    def scale_rows_(self, rows: Rows, factor: Tensor) -> None:
        """factor [n, 1] times dh and dlow of the first n rows."""
        for out in (self.dh, self.dlow):
            if out is not None:
                out = out.view(-1, out.shape[-1])
                rows.put_scaled_(out, 0, rows.take(out, 0, len(factor)), factor)

    def totals(self) -> HeadGradients:
        """As they were accumulated."""
        for total in (self.dh, self.dw, self.dlow, self.dup):
            if self.is_empty and total is not None:
                total.zero_()
        return HeadGradients(self.dh, self.dw, self.db, self.dlow, self.dup)

    def _put_rows(
        self,
        out: Tensor,
        rows: Rows,
        first: int,
        delta: Tensor,
        coef: Tensor,
        operand: Tensor,
        columns: Tensor | None,
    ) -> None:
        """c_t (delta_t operand) of rows [first, first + n) to their places in `out`."""
        out = out.view(-1, out.shape[-1])
        if not self._has_rows and rows.index is not None:
            out.zero_()
        share = rows.output_for(out, first, first + delta.shape[0])
        column_filter.grad_hidden_into(share, delta, operand, columns)
        rows.put_scaled_(out, first, share, coef)

    def _add_weight(self, total: Tensor, delta: Tensor, scaled: Tensor, columns: Tensor | None, factor: float) -> None:
        is_sum = columns is None and total.dtype == delta.dtype
        if factor == 0.0 or (factor != 1.0 and not is_sum):  # times 0, addmm would hide what is not finite
            total.mul_(factor)
            factor = 1.0
        if columns is not None:
            if self.is_empty:
                total.zero_()
            column_filter.add_grad_weight(total, delta, scaled, columns)
        elif total.dtype != delta.dtype and writes_float32(delta):
            add_grad_weight(total, delta, scaled, first=self.is_empty)
        elif total.dtype != delta.dtype:
            self._widen_in_stripes(total, delta, scaled)
        elif self.is_empty:
            grad_weight_into(total, delta, scaled)
        else:
            product_into(total, delta.t(), scaled, beta=factor)

    def _widen_in_stripes(self, total: Tensor, delta: Tensor, scaled: Tensor) -> None:
        """Where a product of 16-bit matrices cannot write float32: a stripe of the vocabulary at a time is widened."""
        vocabulary, width = total.shape
        step = stripe_of(width, delta.dtype)
        part = delta.new_empty(min(step, vocabulary), width)
        for first in range(0, vocabulary, step):
            some = total[first : first + step]
            grad_weight_into(part[: len(some)], delta[:, first : first + step], scaled)
            some.copy_(part[: len(some)]) if self.is_empty else some.add_(part[: len(some)])

    def _add_bias(self, delta: Tensor, coef: Tensor, factor: float) -> None:
        if factor != 1.0:
            self.db *= factor
        step = stripe_of(len(delta), self.db.dtype)
        for first in range(0, delta.shape[1], step):
            part = delta[:, first : first + step].to(self.db.dtype)
            self.db[first : first + step] += (coef.to(part.dtype).t() @ part)[0]
