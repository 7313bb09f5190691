"""Scratch memory of the CPU: large buffers on huge pages, used again by the next call.

Fresh memory costs a page fault every 4 KiB: 40 ms for the 128 MiB of [1024, 65536] bfloat16, 14 ms on huge pages,
where the matrix product that fills it takes 55 (2 cores with AMX, 2026-11-23, see docs/log.md). So the largest buffer
of late is kept when it is let go, marked MADV_FREE: the kernel takes its pages back whenever it needs them, and until
then they still count as resident.
On other devices the allocators of torch do this themselves.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from wrpo_kernels.backends import load_extension

LARGE = 4 << 20  # bytes; below this the faults do not show

# One at most. Its operations are atomic: a buffer may be let go by the garbage collector in the midst of anything.
_kept: deque[mmap.mmap] = deque(maxlen=1)


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], uninitialised. Its memory returns by itself when the last view of it is gone."""
    nbytes = rows * columns * dtype.itemsize
    if device.type != "cpu" or nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    pages = _take(nbytes)
    view = memoryview(pages)
    weakref.finalize(view, _give, pages).atexit = False
    buffer = torch.frombuffer(view, dtype=dtype, count=rows * columns).view(rows, columns)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        buffer.fill_(math.nan)
    return buffer


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The same fresh tensor, with its memory promised in pages of 2 MiB where the system has them."""
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE:
        module, _ = load_extension("_cpu")
        if module is not None:
            module.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def _take(nbytes: int) -> mmap.mmap:
    with suppress(IndexError):
        pages = _kept.pop()
        if nbytes <= len(pages) <= 4 * nbytes:
            return pages
        _kept.append(pages)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give(pages: mmap.mmap) -> None:
    with suppress(OSError, IndexError):
        pages.madvise(mmap.MADV_FREE)
        if not _kept or len(_kept[0]) <= len(pages):
            _kept.append(pages)
