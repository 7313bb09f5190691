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
from wrpo_kernels.lm_head.products import STRIPE_BYTES, scale_rows_, scaled_rows


def kernels(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels where these tensors can have them."""
    if not all(x.is_cuda and triton_backend.refuses(x) is None for x in tensors):
        return None
    return importlib.import_module("wrpo_kernels.lm_head.scaling_kernel")


def gathered(source: Tensor, index: Tensor | None, coef: Tensor | None = None) -> Tensor:
    """[n, D], coef [n, 1] times the rows of source [M, D], or [S, T, D] of any strides, at the places `index` [n]; None
    stands for all rows as they are, or for factors of 1."""
    if coef is None and index is None and source.dim() == 2:
        return source
    fused = kernels(source) if source.stride(-1) == 1 else None
    if fused is not None:
        number = source.shape[:-1].numel() if index is None else len(index)
        out = source.new_empty(number, source.shape[-1])
        fused.gather_rows(source, index, coef, out)
        return out
    rows = _at(source, index)
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
    out = torch.empty_like(total, dtype=dtype)
    fused = kernels(total, out) if total.is_contiguous() else None
    if fused is not None:
        fused.scale(total, factor, out)
        return out
    if out.device.type != "cpu":
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
