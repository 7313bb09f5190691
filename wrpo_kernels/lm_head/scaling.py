"""Rows of hidden states and gradients times their coefficients, totals times the upstream gradient.

On an accelerator by Triton kernels that read, multiply, round and write in one pass: torch takes two or three, and
multiplies a float32 number into 16-bit rows at a third of the bandwidth of a copy (H200, 2026-11-26: 1.45 TB/s of 4.2).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.lm_head.products import STRIPE_BYTES, scale_rows_, scaled_rows

MOST_COMPACTED = 1 << 16  # 16 blocks


def kernels(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels where this tensor can have them."""
    if not tensor.is_cuda or triton_backend.refuses(tensor) is not None:
        return None
    return importlib.import_module("wrpo_kernels.lm_head.scaling_kernel")


def compacted(labels: Tensor, ignore_index: int, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """index [number] int64, where in labels [M] the first that count stand, and these labels; row 0 fills what is left.

    Nothing waits for the device. One launch up to MOST_COMPACTED labels, which one program reads in order.
    """
    fused = kernels(like) if labels.is_contiguous() and labels.numel() <= MOST_COMPACTED else None
    if fused is not None and labels.numel():
        index, kept = labels.new_empty(2, number)
        fused.compact(labels, ignore_index, index, kept)
        return index, kept
    index = torch.nonzero_static(labels != ignore_index, size=number, fill_value=0)[:, 0]
    return index, labels[index]


def gathered(source: Tensor, index: Tensor | None, coef: Tensor | None = None) -> Tensor:
    """[n, D], coef [n, 1] times the rows of source [M, D], or [S, T, D] of any strides, at the places `index` [n]; None
    stands for all rows as they are, or for factors of 1."""
    if coef is None and index is None and source.dim() == 2:
        return source
    fused = kernels(source)
    if fused is not None and source.stride(-1) == 1:
        number = source.shape[:-1].numel() if index is None else len(index)
        out = source.new_empty(number, source.shape[-1])
        fused.gather_rows(source, index, coef, out)
        return out
    rows = source if index is None and source.dim() == 2 else _at(source, index)
    return rows if coef is None else scaled_rows(rows, coef)


def _at(source: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return source.reshape(-1, source.shape[-1])
    if source.dim() == 3:
        return source[index // source.shape[1], index % source.shape[1]]
    return source.index_select(0, index)


def put_scaled_(out: Tensor, index: Tensor | None, share: Tensor, coef: Tensor) -> None:
    """out [M, D] at the places `index` [n] = coef [n, 1] * share [n, D]; None: share is a part of `out`, and scaled
    there."""
    fused = kernels(share)
    if fused is not None:
        fused.scatter_rows(share, index, coef, share if index is None else out)
    elif index is None:
        scale_rows_(share, coef)
    else:
        out.index_copy_(0, index, scale_rows_(share, coef))


def scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """factor [] * total, rounded to `dtype`: no float32 copy of the whole."""
    out = in_huge_pages(torch.empty_like(total, dtype=dtype))
    fused = kernels(total) if total.is_contiguous() else None
    if fused is not None:
        fused.scale(total, factor, out)
        return out
    if out.device.type != "cpu" or total.dtype == dtype:
        return torch.mul(total, factor, out=out)
    step = max(1, STRIPE_BYTES // (4 * max(total[:1].numel(), 1)))  # `out` of another type costs a float32 copy
    for first in range(0, len(total), step):
        out[first : first + step] = total[first : first + step] * factor
    return out


def scaled_in_place(total: Tensor, factor: Tensor) -> Tensor:
    """The same in the memory of the total, in its type; a factor of 1 leaves nothing to do."""
    if factor.is_cpu and factor.item() == 1.0:
        return total
    fused = kernels(total) if total.is_contiguous() else None
    if fused is not None:
        fused.scale(total, factor, total)
        return total
    return total.mul_(factor)
