"""New memory of a CPU in huge pages.

A page that is written for the first time costs the kernel more than the writing: 16 MiB, mapped anew at each call, take
7.0 ms in pages of 4 KiB and 2.8 in pages of 2 MiB, 4 MiB 1.3 and 0.8, less the same (AMX machine, CPU time of one
thread, 2026-11-30, see docs/log.md). Where Linux has huge pages on `madvise`, as most distributions have, they are for
those who ask. Memory that malloc kept from an earlier call is not new: asking once more takes 1 us and changes nothing.
"""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.dispatch.autograd import is_plain
from wrpo_kernels.dispatch.backends import load_extension

LEAST_BYTES = 4 << 20  # below, hardly a huge page lies within


def in_huge_pages(empty: Tensor) -> Tensor:
    """The same tensor, which was just allocated and has not been written: a large one of the CPU asks for huge pages.

    Memory: that of the tensor, rounded up to 2 MiB where the neighbouring memory has asked too. In malloc's heap the
    advice stays with the address when the tensor is gone. Nothing happens to what has no memory of its own, as in a
    trace, to small tensors, and where the system has no such pages.
    """
    if type(empty) is Tensor and empty.is_cpu and empty.nbytes >= LEAST_BYTES and is_plain((empty,)):
        module, _ = load_extension("_cpu")
        if module is not None:
            module.advise_huge_pages(empty.data_ptr(), empty.nbytes)
    return empty
