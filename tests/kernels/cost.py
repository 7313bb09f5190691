"""What a call costs: the matrix products it runs and the memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from unittest.mock import patch

import torch

from wrpo_kernels.lm_head import products

# Every op that multiplies matrices, with the positions of the two factors among its arguments.
PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "mkldnn::_linear_pointwise": (0, 1),
}


@contextmanager
def own_products() -> Iterator[list[int]]:
    """2 * n * k * m of each product of the package's own that runs meanwhile."""
    flops, run = [], products.own_product_into

    def counted(out, left, right, beta):
        flops.append(2 * out.numel() * left.shape[1])
        run(out, left, right, beta)

    with patch.object(products, "own_product_into", counted):
        yield flops


def product_flops(call: Callable[[], object]) -> int:
    """2 * n * k * m, summed over all products that `call` runs, in whatever op they hide."""
    # The host's side alone: an op is recorded where it is called, wherever it then runs. The records as they are: to
    # make the profiler's own events of them takes 0.4 s for 4000.
    with own_products() as own, torch.autograd.profiler.profile(record_shapes=True) as profile:
        call()
    total = sum(own)
    for record in profile.kineto_results.events():
        name = record.name()
        if name in PRODUCTS:
            a, b = (record.shapes()[position] for position in PRODUCTS[name])
            columns = b[0] if name.startswith("mkldnn") else b[-1]
            total += 2 * prod(a) * columns
    return total


def budget_of(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> int:
    """Bytes for the logits [V] of so many rows, with the 4 D values beside each that the docstrings count."""
    return rows * (vocabulary + 4 * width) * dtype.itemsize


MEASURE = """
import json, sys
import torch

def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def growth(call):
    '''Peak resident bytes during `call`, above those before it.'''
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before = resident("VmRSS")
    keep = call()
    return resident("VmHWM") - before
"""


def measured(body: str) -> dict:
    """Runs `body` in a fresh process, in which `growth(call)` measures; returns the dict it leaves in `result`."""
    script = MEASURE + textwrap.dedent(body) + "\nprint(json.dumps(result))\n"
    # Large blocks are mapped and unmapped one by one, so that freed memory leaves the process at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
