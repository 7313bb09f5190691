"""Large memory of the CPU, on huge pages and used again by the next call: logits, and the gradient of a head.

Fresh memory costs a page fault every 4 KiB: 40 ms for the 128 MiB of [1024, 65536] bfloat16, 14 ms on huge pages,
where the matrix product that fills it takes 55 (2 cores with AMX, 2026-11-23); a step of 256 rows and a gradient of
594 MiB took 1.26 times its products with fresh memory for the gradient, 1.05 times with that of the step before (AVX2,
2026-11-26, see docs/log.md). So the last two buffers are kept when they are let go, marked MADV_FREE: the kernel takes
their pages back whenever it needs them, and until then they still count as resident. Around a whole model that costs
more than it spares: `none_kept`.
On other devices the allocators of torch do this themselves.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes; below this the faults do not show

# Two at most, the logits of one step and the gradient of its head. The operations are atomic: a buffer may be let go
# by the garbage collector in the midst of anything.
_kept: deque[mmap.mmap] = deque(maxlen=2)


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


@contextmanager
def none_kept() -> Iterator[None]:
    """While it lasts, what is let go returns to the system at once.

    For whole optimizer steps: with two buffers kept their peak was 1.22 and 1.25 times as high behind a head of 128256
    tokens, and they ran 0.92 and 1.04 times as fast (nine rounds; Zen 5, 2026-11-27, see docs/log.md).
    """
    global _kept
    before, _kept = _kept, deque(maxlen=0)
    before.clear()
    try:
        yield
    finally:
        _kept = before


def _take(nbytes: int) -> mmap.mmap:
    with suppress(IndexError):
        for _ in range(len(_kept)):
            pages = _kept.popleft()
            if nbytes <= len(pages) <= 4 * nbytes:
                return pages
            _kept.append(pages)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _give(pages: mmap.mmap) -> None:
    with suppress(OSError):
        pages.madvise(mmap.MADV_FREE)
        _kept.append(pages)  # the one that has waited longest goes
