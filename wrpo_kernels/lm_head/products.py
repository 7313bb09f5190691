"""The three matrix products of a language-model head, each in the form that is fastest here.

logits = h W^T          dh = delta W          dW = delta^T (c h), accumulated in float32

A CPU that multiplies 16-bit matrices in software only takes a stripe of the vocabulary at a time: what the stripe needs
is widened to float32, multiplied there, and rounded once on its way out. float32 products are the package's own where
that is faster than torch's, see `prefers_own`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.token_logp.native import DTYPE_TAG

ROWS_AT_ONCE = 1024  # of logits that take two products each
STRIPE_BYTES = 8 << 20  # scratch of one stripe of the vocabulary; 2..32 MiB measure alike


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether the CPU products of torch in this type are at least as fast as those in float32.

    Without AVX-512 they are not: on 2 cores with AVX2 h W^T runs at 9 GFLOP/s a core in bfloat16, dh = delta W at 1,
    and float32 at 75 (torch 2.13, 2026-11-24, see docs/log.md).
    """
    question = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if question is None:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, question)())


@cache
def prefers_own() -> bool:
    """Whether float32 products of a CPU are those of csrc/cpu/product.cpp, not torch's.

    So where torch multiplies by Intel's library (MKL) on a processor of another maker, on which it holds back. Of the
    512 GFLOP/s that two cores of Zen 5 can do the three products of SmolLM2's head with 512 rows take 170 to 215 by it
    and 435 to 480 by our own; with AVX2 alone 190 to 210 and 213 to 227 (torch 2.13, 2026-11-30, see docs/log.md).
    """
    module, _ = load_extension("_cpu")
    features = module.features() if module is not None else {}
    is_fast = features.get("simd") in ("avx2", "avx512") and features.get("threads_runtime") == "openmp"
    return is_fast and not features.get("is_intel", True) and torch.backends.mkl.is_available()


def product_into(out: Tensor, left: Tensor, right: Tensor, beta: float = 0.0) -> Tensor:
    """out [m, n] = left [m, k] @ right [k, n] + beta out; with beta = 0 what `out` holds is not read.

    The operands have the type of `out`, or 16 bits where that is float32: they are then widened. `out` overlaps neither
    of them. Our own products sum in float32 whatever `torch.set_float32_matmul_precision` allows.
    """
    if out.dtype == torch.float32 and out.is_cpu and prefers_own() and _is_own_form(out, left, right):
        own_product_into(out, left, right, beta)
        return out
    left, right = left.to(out.dtype), right.to(out.dtype)
    return torch.mm(left, right, out=out) if beta == 0.0 else out.addmm_(left, right, beta=beta)


def _is_own_form(out: Tensor, left: Tensor, right: Tensor) -> bool:
    """What our own product takes and does not lose at: a tile is 24 or 48 columns wide, and pays for all of them (one
    column of [49152, 512] x [512, 1] 2.9 times as long as torch's, Zen 5, 2026-11-30; four are as fast)."""
    is_wide = out.shape[0] > 1 and out.shape[1] > 3
    return is_wide and out.stride(1) == 1 and left.shape[1] > 0 and 1 in left.stride() and 1 in right.stride()


def own_product_into(out: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    """The same of a float32 `out` by csrc/cpu/product.cpp; a row or a column of each operand lies side by side."""
    assert (*out.shape, left.shape[1]) == (left.shape[0], right.shape[1], right.shape[0])  # it would read beyond them
    module, _ = load_extension("_cpu")
    module.product(
        *(left.data_ptr(), DTYPE_TAG[left.dtype], *left.stride()),
        *(right.data_ptr(), DTYPE_TAG[right.dtype], *right.stride()),
        *(out.data_ptr(), out.stride(0), *out.shape, left.shape[1], beta, torch.get_num_threads()),
    )


def is_widened(operand: Tensor) -> bool:
    return operand.dtype.itemsize == 2 and operand.device.type == "cpu" and not multiplies_fast(operand.dtype)


def _wide_stripes(vocabulary: int, *widths: int) -> Iterator[slice]:
    """Parts of the vocabulary whose float32 matrices [part, width] fill STRIPE_BYTES at most each."""
    step = stripe_of(max(*widths, 1), torch.float32)
    return (slice(first, first + step) for first in range(0, vocabulary, step))


def logits_into(
    out: Tensor, hidden: Tensor, weight: Tensor, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """out [n, V] = hidden [n, D] @ weight^T, and of an adapter + low [n, r] @ up^T; of 16-bit operands in their type or
    in float32."""
    if out.dtype != hidden.dtype:
        return float32_logits_into(out, hidden, weight, low, up)
    if not is_widened(hidden):
        if low is None:
            return product_into(out, hidden, weight.t())
        # The small term first: added to 16-bit logits it would be rounded away wherever it is below half their ulp.
        return product_into(product_into(out, low, up.t()), hidden, weight.t(), beta=1.0)
    return _widened_logits_into(out, hidden, weight, low, up)


def float32_logits_into(out: Tensor, hidden: Tensor, weight: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    """The same in float32 of 16-bit operands: sums that are not rounded on their way out.

    CUDA's products write them, and so do our own. Where torch's products of a CPU multiply 16-bit matrices fast, but
    round, two of them take the place of one. Elsewhere the operands are widened, a stripe at a time.
    """
    is_cpu = hidden.device.type == "cpu"
    keeps_sums = subtracts_unrounded(hidden.dtype) if is_cpu else writes_float32(hidden)
    if is_widened(hidden) or not keeps_sums or (is_cpu and prefers_own()):
        return _widened_logits_into(out, hidden, weight, low, up)
    into = _twice_rounded_into if is_cpu else _float32_product_into
    into(out, hidden, weight.t(), first=True)
    if low is not None:
        into(out, low, up.t(), first=False)
    return out


def _widened_logits_into(out: Tensor, hidden: Tensor, weight: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    wide, wide_low = hidden.float(), None if low is None else low.float()
    for part in _wide_stripes(len(weight), *hidden.shape):
        some = out[:, part]
        scores = some if out.dtype == torch.float32 else wide.new_empty(some.shape)
        product_into(scores, wide, weight[part].t())
        if low is not None:
            product_into(scores, wide_low, up[part].t(), beta=1.0)
        if scores is not some:
            some.copy_(scores)
    return out


@cache
def subtracts_unrounded(dtype: torch.dtype) -> bool:
    """Whether a 16-bit product on this CPU takes z off its sum before it rounds, which `_twice_rounded_into` needs.

    oneDNN on x86 does so. What rounds first would leave nothing of the second product, in silence.
    """
    values = torch.sin(torch.arange(2 * 64 * 64, dtype=torch.float64, device="cpu")).to(dtype)
    left, right = values.view(2, 64, 64)
    z = torch.mm(left, right)
    rest = torch.addmm(z, left, right, beta=-1)
    exact = left.double() @ right.double()
    error = (z.double() + rest.double() - exact).abs().max()
    return bool(error < 0.1 * (z.double() - exact).abs().max())


def _twice_rounded_into(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """out [n, V] float32 (+)= left @ right by products that round what they write to 16 bits.

        z = round(left right)        r = round(left right - z)        z + r

    The second product takes z off its float32 sum before it rounds, so that z + r errs by u^2 |z| beside the sum's own
    error: u = 2^-9 in bfloat16, 2^-12 in float16.
    """
    most = min(len(out), ROWS_AT_ONCE)
    step = stripe_of(2 * most, out.dtype)
    rounded, total = left.new_empty(most * step), out.new_empty(most * step)  # in the cache, where `out` is not
    for some_rows, some_left in zip(out.split(most), left.split(most), strict=True):
        for some, factor in zip(some_rows.split(step, 1), right.split(step, 1), strict=True):
            z, wide = (x[: some.numel()].view(some.shape) for x in (rounded, total))
            wide.copy_(torch.mm(some_left, factor, out=z))
            if z.dtype == torch.float16 and not z.isfinite().all():  # beyond 65504 there, not in float32
                torch.mm(some_left.float(), factor.float(), out=wide)
            else:
                z.addmm_(some_left, factor, beta=-1)
                wide.add_(z.nan_to_num_(0.0, 0.0, 0.0))  # beside a z that is infinite
            some.copy_(wide) if first else some.add_(wide)


def grad_hidden_into(out: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """out [n, D] = delta [n, V] @ weight"""
    if not is_widened(delta):
        return product_into(out, delta, weight)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for part in _wide_stripes(len(weight), *out.shape):
        product_into(total, delta[:, part], weight[part], beta=1.0)
    return out.copy_(total)


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
    if is_widened(delta):
        wide = scaled.float()
        for part in _wide_stripes(len(out), *scaled.shape):
            some = out[part]
            some.copy_(product_into(wide.new_empty(some.shape), delta[:, part].t(), wide))
    elif delta.device.type == "cpu" and delta.dtype == torch.bfloat16 and prefers_transposed():
        _grad_weight_transposed(out, delta, scaled)
    else:
        product_into(out, delta.t(), scaled)


def _grad_weight_transposed(out: Tensor, delta: Tensor, scaled: Tensor) -> None:
    rows, columns = delta.shape
    native, _ = load_extension("_cpu")
    step = stripe_of(rows, delta.dtype)
    buffer = delta.new_empty(min(step, columns), rows)
    for first in range(0, columns, step):
        last = min(first + step, columns)
        part, turned = delta[:, first:last], buffer[: last - first]
        native.transpose(
            part.data_ptr(), 2, rows, last - first, part.stride(0), turned.data_ptr(), rows, torch.get_num_threads()
        )
        torch.mm(turned, scaled, out=out[first:last])


def writes_float32(delta: Tensor) -> bool:
    """Whether a product of these 16-bit matrices can leave its float32 sums as they are."""
    return is_widened(delta) or (
        delta.device.type == "cuda" and torch.version.hip is None and delta.dtype != torch.float64
    )


def add_grad_weight(total: Tensor, delta: Tensor, scaled: Tensor, first: bool) -> None:
    """total [v, D] float32 += delta^T @ scaled in one product, its sum never rounded; the first one overwrites."""
    if is_widened(delta):
        wide = scaled.float()
        for part in _wide_stripes(len(total), *scaled.shape):
            product_into(total[part], delta[:, part].t(), wide, beta=0.0 if first else 1.0)
    else:
        _float32_product_into(total, delta.t(), scaled, first)


def _float32_product_into(out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """out float32 (+)= left @ right of 16-bit matrices, where `writes_float32` says so of an accelerator."""
    if first:
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    elif adds_float32(left.device, left.dtype):
        torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    else:
        for part in _wide_stripes(len(out), right.shape[1]):
            out[part] += float32_product(left[part], right)


@cache
def adds_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of two such 16-bit matrices to a float32 one; 2.8 and 2.9 do not on CUDA."""
    zeros = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(zeros.float(), zeros, zeros, torch.float32, out=zeros.float())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two 16-bit matrices with its float32 sums as they are."""
    return torch.ops.aten.mm.dtype(left, right, torch.float32)


def stripe_of(width: int, dtype: torch.dtype) -> int:
    """Columns of the vocabulary whose [columns, width] scratch fills STRIPE_BYTES."""
    return max(64, STRIPE_BYTES // (width * dtype.itemsize) // 64 * 64)


def scaled_rows(rows: Tensor, coef: Tensor) -> Tensor:
    """coef [n, 1] * rows [n, D], rounded once: a coefficient rounded to 16 bits first would bias its whole sequence."""
    scaled = rows.to(coef.dtype).mul_(coef) if _widens_first(rows, coef) else rows * coef
    return scaled if scaled.dtype == rows.dtype else scaled.to(rows.dtype)


def scale_rows_(rows: Tensor, coef: Tensor) -> Tensor:
    """The same in place."""
    return rows.copy_(rows.to(coef.dtype).mul_(coef)) if _widens_first(rows, coef) else rows.mul_(coef)


def _widens_first(rows: Tensor, coef: Tensor) -> bool:
    """A CPU's product of two types is slow: with the rounding that follows 512 rows of 576 take 0.21 ms so and 0.15
    widened, of 1024 1.68 and 0.36 (one core with AMX, 2026-11-30, see docs/log.md)."""
    return rows.is_cpu and rows.dtype != coef.dtype
