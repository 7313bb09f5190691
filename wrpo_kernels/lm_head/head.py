"""A language-model head over one chunk of rows: the logits of the chunk live in a buffer, then become their delta."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from wrpo_kernels.checks import check_labels
from wrpo_kernels.dispatch.backends import Backend, choose
from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.dispatch.triton_backend import FusedTritonBackend
from wrpo_kernels.lm_head.budget import logits_buffer
from wrpo_kernels.lm_head.exp_product.form import ExpProduct
from wrpo_kernels.lm_head.exp_product.self_check import require
from wrpo_kernels.lm_head.inputs import HeadOptions, HeadTensors
from wrpo_kernels.lm_head.products import logits_into
from wrpo_kernels.lm_head.rows import Rows, slice_rows
from wrpo_kernels.token_logp import native
from wrpo_kernels.token_logp.contract import CANDIDATES as ROW_KERNELS
from wrpo_kernels.token_logp.contract import logp_dtype

# The CPU's own first: a toy feels how long the others take to say no.
CANDIDATES = (
    native,
    ExpProduct(),
    *(kernel for kernel in ROW_KERNELS if kernel is not native),
    FusedTritonBackend("wrpo_kernels.lm_head.triton_kernel"),
)


def no_autocast(like: Tensor) -> AbstractContextManager:
    """The types of the arguments settle those of the products: autocast, which would cast them again, stays out."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class LabelsByPosition:
    """A row kernel sees compacted rows; a label that it refuses is reported where the caller wrote it."""

    def __init__(self, name: str, tensors: HeadTensors, ignore_index: int) -> None:
        self._labels = (name, tensors.target, ignore_index, tensors.weight.shape[0])

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, ValueError):
            name, target, *expected = self._labels
            check_labels(name, target.reshape(-1), *expected)


class Head:
    """The transform of the logits, the row kernel, and `weight` [V, D] and an adapter's `up` [V, r] in the type of the
    hidden states.

    Attributes:
        writes_in_place: whether a delta takes the place of its logits. Those in float32 of 16-bit operands leave it
            beside them, in the type in which it is multiplied.
    """

    def __init__(
        self, tensors: HeadTensors, options: HeadOptions, candidates: tuple[Backend, ...] = CANDIDATES
    ) -> None:
        hidden, weight, up = tensors.hidden, tensors.weight, tensors.up
        self.weight_dtype, self.up_dtype = weight.dtype, None if up is None else up.dtype  # as the caller has them
        self.weight = weight
        if weight.dtype != hidden.dtype:
            self.weight = in_huge_pages(torch.empty_like(weight, dtype=hidden.dtype)).copy_(weight)
        self.up = None if up is None else up.to(hidden.dtype)
        self.transform = options.transform(tensors.bias)
        self.ignore_index = options.ignore_index
        self.kernel = choose(options.backend, candidates, hidden)
        self.logp_dtype = logp_dtype(hidden.dtype)
        self._powers = self.kernel if isinstance(self.kernel, ExpProduct) else None
        self.writes_in_place = self._powers is not None or not options.has_float32_logits  # powers are of float32 sums
        self._deltas: Tensor | None = None
        if self._powers is not None:
            if options.grad_filter:
                raise RuntimeError("triton_exp: has no grad_filter, which compares deltas; leave out one of the two")
            require(self._powers, hidden.device, self.transform, up is not None)

    @property
    def is_fused(self) -> bool:
        """Whether log-probs come straight from the hidden states, without a buffer of logits."""
        return self._powers is not None or (isinstance(self.kernel, FusedTritonBackend) and self.up is None)

    def buffer(self, num_rows: int) -> Tensor:
        """Scratch for the logits of these rows."""
        dtype = self.weight.dtype if self.writes_in_place else torch.float32
        return logits_buffer(self.weight, num_rows, len(self.weight), dtype)

    def logp_of(self, rows: Rows, logp: Tensor) -> None:
        if self._powers is not None:
            self._powers.logp_of_hidden(*self._operands(rows, 0, len(rows)), logp)
        else:
            hidden = rows.hidden(0, len(rows))
            self.kernel.logp_of_hidden(hidden, self.weight, rows.target, self.ignore_index, self.transform, logp)

    def logp_into(self, logp: Tensor, rows: Rows, first: int, last: int, buffer: Tensor) -> None:
        """Log-probs of rows [first, last) into `logp` [n]; the buffer [>= n, V] is scratch."""
        if self._powers is not None:
            self._powers.logp_of_hidden(*self._operands(rows, first, last), logp)
        else:
            self._run(self.kernel.forward, logp, rows, first, last, buffer)

    def delta_into(
        self, logp: Tensor, rows: Rows, first: int, last: int, buffer: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The same, and returns d logp / d (h W^T) [n, V], its rows still to be scaled: see `coefficients`. It is in
        the buffer, or `narrowed` from there."""
        if self._powers is None:
            return self.narrowed(self._run(self.kernel.delta_, logp, rows, first, last, buffer), len(buffer), out)
        out = slice_rows(buffer, 0, last - first)
        self._powers.delta_of_hidden(*self._operands(rows, first, last), logp, out)
        return out

    def narrowed(self, delta: Tensor, most: int, out: Tensor | None = None) -> Tensor:
        """delta [n, V] in the type in which it is multiplied: itself, `out`, or memory for `most` rows that the next
        call takes again."""
        if delta.dtype == self.weight.dtype:
            return delta
        if out is None:
            if self._deltas is None:
                self._deltas = logits_buffer(self.weight, most, len(self.weight))
            out = slice_rows(self._deltas, 0, len(delta))
        return out.copy_(delta)

    def coefficients(self, coef: Tensor, logp: Tensor) -> Tensor:
        """[n, 1], what multiplies the rows that `delta_into` left beside these log-probs [n], for `coef` [n, 1] times
        their delta."""
        return coef if self._powers is None else self._powers.coefficients(coef, logp, self.transform.slope)

    def _operands(self, rows: Rows, first: int, last: int) -> tuple:
        operands = (rows.hidden(first, last), self.weight, rows.low(first, last), self.up)
        return operands, slice_rows(rows.target, first, last), self.ignore_index, self.transform

    def _run(self, kernel: Callable, logp: Tensor, rows: Rows, first: int, last: int, buffer: Tensor) -> Tensor:
        lse = logp.new_empty(2, last - first)
        out, hidden, low = slice_rows(buffer, 0, last - first), rows.hidden(first, last), rows.low(first, last)
        logits = logits_into(out, hidden, self.weight, low, self.up)
        kernel(logits, slice_rows(rows.target, first, last), self.ignore_index, self.transform, logp, lse)
        return logits
