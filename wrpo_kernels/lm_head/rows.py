"""The rows that count: positions whose label is a response token. Prompt and padding never reach the head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from wrpo_kernels.checks import check_int, is_readable
from wrpo_kernels.dispatch.autograd import is_plain
from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.lm_head import scaling
from wrpo_kernels.lm_head.products import scaled_rows

UNCOUNTED = -1


def most_rows(num_rows: int, target: Tensor) -> int:
    """`num_rows`, or, where they are uncounted, as many as there are labels."""
    return target.numel() if num_rows == UNCOUNTED else num_rows


def slice_rows(values: Tensor, first: int, last: int) -> Tensor:
    """values[first:last]; the tensor itself where that is all of it, for a view costs 1 to 4 us."""
    return values if last - first == values.shape[0] else values[first:last]


class Rows:
    """Rows of `hidden` [M, D], or [S, T, D] of any strides, and `target` [M], compacted chunk by chunk.

    Attributes:
        index: [N] int64, their positions in `hidden`; None when all M rows are taken as they stand.
        target: [N] int64, their labels.

    `low` [M, r] is what an adapter on the head multiplies beside the hidden states.
    """

    def __init__(
        self,
        hidden: Tensor,
        target: Tensor,
        index: Tensor | None,
        low: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self._hidden, self._labels, self._low = hidden, target, low
        self.index = index
        self.target = kept if kept is not None else target.contiguous() if index is None else target[index]

    @classmethod
    def that_count(
        cls, hidden: Tensor, target: Tensor, ignore_index: int, num_rows: int = UNCOUNTED, low: Tensor | None = None
    ) -> Rows:
        """The rows whose label is not `ignore_index`; on an accelerator `num_rows` of them, without waiting for it."""
        target = target.reshape(-1)
        if hidden.dim() != 3 or hidden.is_contiguous():  # a slice such as hidden[:, :-1] is not copied to be flattened
            hidden = hidden.reshape(-1, hidden.shape[-1])
        if low is not None:
            low = low.reshape(-1, low.shape[-1])
        if num_rows == target.shape[0]:
            return cls(hidden, target, None, low)
        if num_rows == UNCOUNTED or target.device.type == "cpu":
            index = (target != ignore_index).nonzero()[:, 0]
            if num_rows not in (UNCOUNTED, index.shape[0]):  # as compiled code may say, which counts nothing before
                raise _wrong_count(index.shape[0], num_rows)
        else:
            # A count that is too large is filled with row 0; `nan_unless_counted` tells.
            index, kept = scaling.compacted(target, ignore_index, num_rows, hidden)
            return cls(hidden, target, index, low, kept)
        return cls(hidden, target, None if index.shape[0] == target.shape[0] else index, low)

    def __len__(self) -> int:
        return self.target.numel()

    def at(self, positions: Tensor) -> Rows:
        """The rows at these positions of `hidden`, in this order."""
        return Rows(self._hidden, self._labels, positions, self._low)

    def positions(self) -> Tensor:
        """[N] int64, where each row stands in `hidden`."""
        return torch.arange(len(self), device=self.target.device) if self.index is None else self.index

    def hidden(self, first: int, last: int, coef: Tensor | None = None) -> Tensor:
        """[last - first, D], times coef [last - first, 1] if given; a view where nothing was left out or scaled."""
        if self._hidden.dim() == 3:
            return scaling.gathered(self._hidden, slice_rows(self.positions(), first, last), coef)
        if self.index is None:
            return scaling.gathered(slice_rows(self._hidden, first, last), None, coef)
        return scaling.gathered(self._hidden, slice_rows(self.index, first, last), coef)

    def low(self, first: int, last: int) -> Tensor | None:
        """[last - first, r] of an adapter, in the type of the hidden states."""
        if self._low is None:
            return None
        return self.take(self._low, first, last).to(self._hidden.dtype)

    def take(self, values: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """[M, ...] -> [N, ...], or of rows [first, last) alone; a view where nothing was left out."""
        last = len(self) if last is None else last
        if self.index is None:
            return slice_rows(values, first, last)
        return values.index_select(0, slice_rows(self.index, first, last))

    def output_for(self, out: Tensor, first: int, last: int) -> Tensor:
        """Where values of rows [first, last) are to be written: in `out` [M, ...] itself if nothing was left out."""
        if self.index is None:
            return slice_rows(out, first, last)
        return out.new_empty(last - first, *out.shape[1:])

    def put_scaled_(self, out: Tensor, first: int, values: Tensor, coef: Tensor) -> None:
        """Takes values that were written into `output_for(out, first, ...)`, times coef [n, 1], to their places in
        `out`."""
        index = None if self.index is None else slice_rows(self.index, first, first + values.shape[0])
        scaling.put_scaled_(out, index, values, coef)

    def spread_scaled(self, values: Tensor, coef: Tensor) -> Tensor:
        """[N, D] times coef [N, 1] -> [M, D], zero where the label does not count."""
        fused = scaling.kernels(values)
        if fused is None:
            return self.spread(scaled_rows(values, coef))
        shape = (len(self._labels), *values.shape[1:])
        out = values.new_empty(shape) if self.index is None else values.new_zeros(shape)
        fused.scatter_rows(values, self.index, coef, out)
        return out

    def spread(self, values: Tensor) -> Tensor:
        """[N, ...] -> [M, ...], zero where the label does not count."""
        if self.index is None:
            return values
        out = values.new_zeros(len(self._labels), *values.shape[1:])
        return out.index_copy_(0, self.index, values)


def count_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """[S, T] -> [S] int64, how many labels of each sequence count."""
    module = load_extension("_cpu")[0] if labels.is_cpu and is_plain((labels,)) else None
    if module is None:
        return (labels != ignore_index).sum(1)
    counts = labels.new_empty(labels.shape[0])
    module.count_labels(labels.data_ptr(), *labels.shape, *labels.stride(), ignore_index, counts.data_ptr())
    return counts


def count_rows(length: Tensor, most: int, num_rows: int | None) -> int:
    """How many of `most` labels count: `num_rows` where the caller says so, else the sum of `length` [S], read back.

    UNCOUNTED where it cannot be read: while compiling, and of meta tensors.
    """
    if num_rows is not None:
        check_int("num_rows", num_rows)
        if not 0 <= num_rows <= most:
            raise ValueError(f"num_rows must be in [0, {most}], the number of labels, got {num_rows}")
    if is_compiling() or length.is_meta:
        return UNCOUNTED if num_rows is None else num_rows
    if num_rows is not None and not length.is_cpu:
        return num_rows
    # Small tensors are added up by Python, past the dispatcher.
    counted = sum(length.tolist()) if length.is_cpu else int(length.sum())
    if num_rows not in (None, counted):
        raise _wrong_count(counted, num_rows)
    return counted


def _wrong_count(counted: int, num_rows: int) -> ValueError:
    return ValueError(f"num_rows must be the number of labels that count, {counted}, got {num_rows}")


def nan_unless_counted(values: Sequence[Tensor], length: Tensor, num_rows: int | None) -> Sequence[Tensor]:
    """A wrong `num_rows` would leave rows out in silence, and raising would wait for the device: it gives NaN."""
    if num_rows is None or is_readable(length):
        return values
    return nan_unless(values, length.sum() == num_rows)


def nan_unless(values: Sequence[Tensor], is_right: Tensor) -> list[Tensor]:
    """The values, or NaN in their place."""
    one = torch.where(is_right, 1.0, torch.nan)
    return [value * one.to(value.dtype) for value in values]
