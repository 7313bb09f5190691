"""Rows and totals times numbers that lie on the device, each read once, rounded once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["T", "stride_s", "stride_t"])
def _gather_rows(
    source,  # [S, T, D]
    index,  # [n] int64, places in [S T]
    coef,  # [n]
    out,  # [n, D]
    D,
    T,
    stride_s,
    stride_t,
    HAS_INDEX: tl.constexpr,
    HAS_COEF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = n
    if HAS_INDEX:
        place = tl.load(index + n)
    x = tl.load(source + (place // T) * stride_s + (place % T) * stride_t + cols, mask=cols < D)
    if HAS_COEF:
        x = x.to(tl.float32) * tl.load(coef + n)
    tl.store(out + n * D + cols, x.to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def _scatter_rows(share, index, coef, out, D, HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, D] at `index` [n] = coef [n] * share [n, D]; without an index in the same rows."""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = n
    if HAS_INDEX:
        place = tl.load(index + n)
    x = tl.load(share + n * D + cols, mask=cols < D).to(tl.float32) * tl.load(coef + n)
    tl.store(out + place * D + cols, x.to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def _scale(total, factor, out, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor [] * total; by 1 in place there is nothing to do."""
    f = tl.load(factor)
    if not IN_PLACE or f != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(total + at, mask=at < size).to(tl.float32) * f
        tl.store(out + at, x.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["number", "size"])
def _compact(labels, index, kept, number, size, ignore_index, BLOCK: tl.constexpr):
    """One program, a block of labels after the other: the places of the first `size` that count, and these labels. Of
    fewer the rest is row 0."""
    found = 0
    for start in range(0, number, BLOCK):
        at = start + tl.arange(0, BLOCK)
        label = tl.load(labels + at, mask=at < number, other=ignore_index)
        counts = (label != ignore_index).to(tl.int32)
        place = found + tl.cumsum(counts, 0) - counts
        is_kept = (counts > 0) & (place < size)
        tl.store(index + place, at.to(tl.int64), mask=is_kept)
        tl.store(kept + place, label, mask=is_kept)
        found += tl.sum(counts, 0)
    first = tl.load(labels)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_left = (at < size) & (at >= found)
        tl.store(index + at, tl.zeros_like(at).to(tl.int64), mask=is_left)
        tl.store(kept + at, tl.zeros_like(at).to(tl.int64) + first, mask=is_left)


def compact(labels: Tensor, ignore_index: int, index: Tensor, kept: Tensor) -> None:
    """index [n], where in labels [M] int64, contiguous, the first n that count stand, and kept [n], these labels."""
    if not index.numel():
        return
    with torch.cuda.device_of(labels):
        _compact[(1,)](
            *(labels, index, kept, labels.numel(), index.numel(), ignore_index), BLOCK=4 * BLOCK, num_warps=8
        )


def gather_rows(source: Tensor, index: Tensor | None, coef: Tensor | None, out: Tensor) -> None:
    """out [n, D] = coef [n, 1] * the rows of source [M, D] or [S, T, D], last dim contiguous, at `index` [n]."""
    number, width = out.shape
    if not out.numel():
        return
    steps = source.shape[1] if source.dim() == 3 else 1
    strides = source.stride() if source.dim() == 3 else (source.stride(0), 0, 1)
    with torch.cuda.device_of(out):
        _gather_rows[(number, triton.cdiv(width, BLOCK))](
            *(source, source if index is None else index, source if coef is None else coef.contiguous(), out),
            *(width, steps, strides[0], strides[1]),
            HAS_INDEX=index is not None,
            HAS_COEF=coef is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )


def scatter_rows(share: Tensor, index: Tensor | None, coef: Tensor, out: Tensor) -> None:
    """out [M, D] at `index` [n] = coef [n, 1] * share [n, D]; None: the first n rows, which may be `share` itself."""
    number, width = share.shape
    if not share.numel():
        return
    with torch.cuda.device_of(out):
        _scatter_rows[(number, triton.cdiv(width, BLOCK))](
            *(share, share if index is None else index, coef.contiguous(), out, width),
            HAS_INDEX=index is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )


def scale(total: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor [] * total, both contiguous; `out` may be `total`."""
    if not total.numel():
        return
    with torch.cuda.device_of(out):
        _scale[(triton.cdiv(total.numel(), 4 * BLOCK),)](
            *(total, factor, out, total.numel()), IN_PLACE=out is total, BLOCK=4 * BLOCK, num_warps=8
        )
