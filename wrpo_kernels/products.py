"""The three matrix products of a language-model head, each in the form that is fastest here.

logits = h W^T          dh = delta W          dW = delta^T (c h), accumulated in float32
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from wrpo_kernels.backends import load_extension
from wrpo_kernels.scratch import scratch

STRIPE_BYTES = 8 << 20  # scratch of one stripe of the vocabulary; 2..32 MiB measure alike


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=out)  # [n, V]


def grad_hidden_into(out: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(delta, weight, out=out)  # [n, D]


@cache
def prefers_transposed() -> bool:
    """Whether a bfloat16 product is so fast with both operands row-major that transposing delta first pays.

    With AMX, [65536, 1024] = delta^T [1024, 1024]: 102 ms as a transposed view, 51 ms from a contiguous transpose
    (2 cores, bfloat16, 2026-11-23). Without AMX both forms run alike and the copy would be lost.
    """
    module, _ = load_extension("_cpu")
    return module is not None and bool(module.features()["amx_bf16"])


def grad_weight_into(out: Tensor, delta: Tensor, scaled: Tensor) -> None:
    """out [v, D] = delta^T [v, n] @ scaled [n, D], summed in float32 inside the product and rounded once."""
    if delta.device.type != "cpu" or delta.dtype != torch.bfloat16 or not prefers_transposed():
        torch.mm(delta.t(), scaled, out=out)
        return
    rows, columns = delta.shape
    native, _ = load_extension("_cpu")
    step = stripe_of(rows, delta.dtype)
    buffer = scratch(min(step, columns), rows, delta.dtype, delta.device)
    for first in range(0, columns, step):
        last = min(first + step, columns)
        part, turned = delta[:, first:last], buffer[: last - first]
        native.transpose(
            part.data_ptr(), 2, rows, last - first, part.stride(0), turned.data_ptr(), rows, torch.get_num_threads()
        )
        torch.mm(turned, scaled, out=out[first:last])


def writes_float32(delta: Tensor) -> bool:
    """Whether a product of these 16-bit matrices can leave its float32 sums as they are."""
    return delta.device.type == "cuda" and torch.version.hip is None and delta.dtype != torch.float64


def add_grad_weight(total: Tensor, delta: Tensor, scaled: Tensor, first: bool) -> None:
    """total [v, D] float32 += delta^T @ scaled in one product, its sum never rounded; the first one overwrites."""
    if first:
        torch.ops.aten.mm.dtype_out(delta.t(), scaled, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, delta.t(), scaled, total.dtype, out=total)


def stripe_of(width: int, dtype: torch.dtype) -> int:
    """Columns of the vocabulary whose [columns, width] scratch fills STRIPE_BYTES."""
    return max(64, STRIPE_BYTES // (width * dtype.itemsize) // 64 * 64)


def scaled_rows(rows: Tensor, coef: Tensor) -> Tensor:
    """coef[n] * rows[n], rounded once: a coefficient rounded to 16 bits first would bias all rows of its sequence."""
    return (rows * coef[:, None]).to(rows.dtype)
