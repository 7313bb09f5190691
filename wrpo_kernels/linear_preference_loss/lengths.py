"""How many labels of each sequence count: counted where the labels are, or told by the host.

Labels on an accelerator can only be counted by waiting for it. A caller who knows the lengths on the host spares that:
they go to the device in one copy, what is planned by them is planned here, and the count that proves them is queued
behind all other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from wrpo_kernels.checks import check_int, check_int64, check_shape, check_tensor, is_readable
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.layout import count_sequences
from wrpo_kernels.linear_preference_loss import contract
from wrpo_kernels.lm_head.rows import UNCOUNTED, count_labels, count_rows, nan_unless, nan_unless_counted

Lengths: TypeAlias = Sequence[int] | Tensor


class Counts:
    """The labels that count of S sequences.

    Attributes:
        told: [S] int64 on the CPU, of labels on another device whose caller knows the lengths; else None.
        length: [S] int64 on the device of the labels; None where they are told.
    """

    def __init__(
        self,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        ignore_index: int,
        lengths: Lengths | None,
        num_rows: int | None,
    ) -> None:
        self._labels, self._num_rows = (labels, cu_seqlens, ignore_index), num_rows
        self._given = None if lengths is None else _checked(lengths, labels, cu_seqlens, num_rows)
        self.told = None if labels.is_cpu else self._given
        self.length = _counted(*self._labels) if self.told is None else None
        if self._given is not None and self.length is not None and is_readable(self.length):
            _refuse_other(self._given.tolist(), self.length.tolist())

    def on_device(self) -> Tensor:
        """[S] int64, on the device of the labels."""
        if self.length is None:
            assert self.told is not None
            self.length = to_device(self.told, torch.int64, self._labels[0].device)
        return self.length

    def with_groups(self, group: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Lengths [S] and groups [S] on the device of the labels, by one copy, and [2, S] on the CPU where the host
        knows both of labels on another device."""
        labels, *_ = self._labels
        if labels.is_cpu:
            return self.on_device(), group, None
        device = labels.device
        check_tensor("group", group)
        check_int64("group", group)
        is_known = group.device.type == "cpu"
        if self.told is None or not is_known:
            return self.on_device(), to_device(group, torch.int64, device) if is_known else group, None
        check_shape("group", group, "[S]", len(self.told))
        on_host = torch.stack([self.told, group])
        self.length, group = to_device(on_host, torch.int64, device).unbind()
        return self.length, group, on_host

    def rows(self) -> int:
        """How many labels count in all, or UNCOUNTED; here an accelerator is waited for if nobody knows."""
        if self.told is not None:
            return (
                (UNCOUNTED if self._num_rows is None else self._num_rows) if is_compiling() else sum(self.told.tolist())
            )
        return count_rows(self.length, self._labels[0].numel(), self._num_rows)

    def nan_where_wrong(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values; NaN where lengths or a number of rows that could not be proved before turn out wrong."""
        if self._given is None:
            return nan_unless_counted(values, self.length, self._num_rows)
        if is_readable(self.length):
            return values
        if self.told is None:
            return nan_unless(values, (self.length == self._given).all())
        return nan_unless(values, (self.length == _counted(*self._labels)).all())


def _checked(lengths: Lengths, labels: Tensor, cu_seqlens: Tensor | None, num_rows: int | None) -> Tensor:
    """[S] int64 on the CPU."""
    if isinstance(lengths, (list, tuple)):
        for length in lengths:
            check_int("each of lengths", length)
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    elif not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a list, a tuple or a tensor on the CPU, got {type(lengths).__name__}")
    check_tensor("lengths", lengths)
    if lengths.device.type != "cpu":
        raise ValueError(
            f"lengths must be on the CPU, where nothing waits to read them, got {lengths.device}; leave them out, and "
            "the labels are counted"
        )
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths must be int32 or int64, got {lengths.dtype}")
    check_shape("lengths", lengths, "[S]", count_sequences(labels, cu_seqlens))
    if is_readable(lengths):
        _check_values(lengths.tolist(), labels.numel(), num_rows)
    return lengths.to(torch.int64)


def _check_values(lengths: list[int], num_labels: int, num_rows: int | None) -> None:
    total = sum(lengths)
    if min(lengths, default=0) < 0 or total > num_labels:
        raise ValueError(f"lengths must be >= 0 and sum to at most {num_labels}, the number of labels, got {lengths}")
    if num_rows not in (None, total):
        raise ValueError(f"num_rows must be the sum of lengths, {total}, got {num_rows}")


def _refuse_other(given: list[int], counted: list[int]) -> None:
    if given != counted:
        raise ValueError(f"lengths must be how many labels of each sequence count, {counted}, got {given}")


def _counted(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """[S] int64, on the device of the labels."""
    if cu_seqlens is None:
        return count_labels(labels, ignore_index)
    return per_sequence(labels != ignore_index, cu_seqlens)


def per_sequence(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[S, T] or packed [N] -> [S]; booleans are counted as int64, log-probs summed in float64.

    Wrong bounds on an accelerator make every log-prob NaN and every length -1, which makes NaN of the loss.
    """
    wide = torch.float64 if values.is_floating_point() else torch.int64
    narrow = values.dtype if values.is_floating_point() else torch.int64
    if cu_seqlens is None:
        return values.sum(1, dtype=wide).to(narrow)
    bounds = to_device(contract.checked_cu_seqlens(cu_seqlens, len(values)), torch.int64, values.device)
    # On an accelerator the checks of segment_reduce would read the bounds back.
    unsafe = values.device.type != "cpu"
    within = bounds.clamp(0, len(values)) if unsafe else bounds
    sums = torch.segment_reduce(values.double(), "sum", offsets=within, axis=0, initial=0.0, unsafe=unsafe).to(narrow)
    if cu_seqlens.device.type == "cpu":
        return sums
    return sums.where(contract.are_bounds(bounds, len(values)), torch.nan if values.is_floating_point() else -1)
