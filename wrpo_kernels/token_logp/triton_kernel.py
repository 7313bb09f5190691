"""`token_logp` by Triton kernels: a row of logits is read once, and its delta written in place in the same launch.

    pass 1   tile after tile of a row -> running log-sum-exp of each lane, merged once at the end
    pass 2   (delta only) the same tiles, last one first: what was read last is still in the second-level cache

A label outside [0, V) that is not `ignore_index` cannot raise without waiting for the device: its row is NaN in logp,
lse and delta. Under anomaly detection, and on the CPU, the labels are read first and a wrong one raises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrpo_kernels.checks import check_labels
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.triton_backend import device_facts
from wrpo_kernels.triton_math import LOWEST, merged, take_in, tile_columns, transformed

# 16 warps with four loads of 16 bytes a thread under way: 32 KiB a program, what a multiprocessor must have in flight
# to fill the memory of an H100 (bandwidth * latency / 132). Chosen by that count; no GPU has measured it.
UNROLL, NUM_WARPS = 4, 16
BLOCK = 4096  # of a row, in the out-of-place gradient
MOST_PROGRAMS = 4  # a multiprocessor; 64 warps is all it holds


@triton.jit
def _load_scores(row, bias, cols, in_row, scale, cap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Scores of a row at `cols`, -inf beyond its end, and the bend of the softcap there."""
    x = tl.load(row + cols, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=in_row, other=0.0).to(tl.float32)
    z, bend = transformed(x, scale, cap, HAS_SOFTCAP)
    return tl.where(in_row, z, float("-inf")), bend


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _token_logp_fwd(
    logits,  # [N, V], becomes delta if WRITES_DELTA
    target,  # [N] int64
    bias,  # [V]
    logp,  # [N] float32
    lse,  # [N] float32
    num_rows,
    V,
    stride_n,
    ignore_index,
    scale,
    cap,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WRITES_DELTA: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    within = tile_columns(LANES, UNROLL, VECTOR)  # [UNROLL, LANES, VECTOR]
    num_tiles = tl.cdiv(V, TILE)
    for n in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = logits + tl.cast(n, tl.int64) * stride_n
        label = tl.load(target + n)
        if label == ignore_index:
            tl.store(logp + n, 0.0)
            tl.store(lse + n, 0.0)
            if WRITES_DELTA:
                for tile in range(num_tiles):
                    cols = tile * TILE + within
                    tl.store(row + cols, tl.zeros([UNROLL, LANES, VECTOR], row.dtype.element_ty), mask=cols < V)
        else:
            is_token = (label >= 0) & (label < V)
            token = tl.where(is_token, label, 0).to(tl.int32)
            chosen, _chosen_bend = _load_scores(row, bias, token, is_token, scale, cap, HAS_BIAS, HAS_SOFTCAP)
            top = tl.full([LANES], LOWEST, tl.float32)
            total = tl.zeros([LANES], tl.float32)
            for tile in range(num_tiles):
                cols = tile * TILE + within
                z, bend = _load_scores(row, bias, cols, cols < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
                top, total = take_in(top, total, z)
            highest, whole = merged(top, total)
            whole = tl.where(is_token, whole, float("nan"))
            log_whole = tl.log(whole)
            tl.store(logp + n, (chosen - highest) - log_whole)
            tl.store(lse + n, highest + log_whole)
            if WRITES_DELTA:
                share = 1.0 / whole
                for step in range(num_tiles):
                    cols = (num_tiles - 1 - step) * TILE + within
                    z, bend = _load_scores(row, bias, cols, cols < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
                    delta = tl.where(cols == token, 1.0, 0.0) - tl.exp(z - highest) * share
                    delta *= slope * bend
                    tl.store(row + cols, delta.to(row.dtype.element_ty), mask=cols < V)


@triton.jit(do_not_specialize=["ignore_index"])
def _token_logp_bwd(
    logits,  # [N, V]
    target,  # [N] int64
    bias,  # [V]
    lse,  # [N] float32
    grad_logp,  # [N] float32
    grad_logits,  # [N, V]; may be logits
    V,
    stride_n,
    grad_stride_n,
    ignore_index,
    scale,
    cap,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = grad_logits + n * grad_stride_n
    label = tl.load(target + n)
    if label == ignore_index:
        tl.store(out + cols, tl.zeros([BLOCK], out.dtype.element_ty), mask=cols < V)
    else:
        row = logits + n * stride_n
        z, bend = _load_scores(row, bias, cols, cols < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        delta = tl.where(cols == label, 1.0, 0.0) - tl.exp(z - tl.load(lse + n))
        delta *= tl.load(grad_logp + n) * slope * bend
        tl.store(out + cols, delta.to(out.dtype.element_ty), mask=cols < V)


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """Writes `logp` [N] and `lse` [N]."""
    check_labels_where_free(logits, target, ignore_index, logits.shape[1])
    rows_kernel(logits, target, ignore_index, transform, logp, lse, writes_delta=False)


def delta_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """`forward`, and leaves `delta[n, v] = d logp[n] / d logits[n, v]` in place of the logits."""
    check_labels_where_free(logits, target, ignore_index, logits.shape[1])
    rows_kernel(logits, target, ignore_index, transform, logp, lse, writes_delta=True)


def rows_kernel(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    logp: Tensor,
    lse: Tensor,
    writes_delta: bool,
) -> None:
    if not len(logits):
        return
    with torch.cuda.device_of(logits):
        _token_logp_fwd[(programs(logits, writes_delta),)](
            logits,
            target,
            *_bias(transform, logits),
            logp,
            lse,
            *logits.shape,
            logits.stride(0),
            ignore_index,
            *factors(transform),
            HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.softcap > 0,
            WRITES_DELTA=writes_delta,
            **tile(logits),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


def grad(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    lse: Tensor,
    grad_logp: Tensor,
    grad_logits: Tensor,
) -> None:
    """Writes `grad_logits[n, v] = grad_logp[n] * delta[n, v]`."""
    num_rows, vocabulary = logits.shape
    if not num_rows:
        return
    with torch.cuda.device_of(logits):
        _token_logp_bwd[(num_rows, triton.cdiv(vocabulary, BLOCK))](
            logits,
            target,
            *_bias(transform, logits),
            lse,
            grad_logp,
            grad_logits,
            vocabulary,
            logits.stride(0),
            grad_logits.stride(0),
            ignore_index,
            *factors(transform),
            HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.softcap > 0,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )


def tile(logits: Tensor) -> dict[str, int]:
    """Shape of a tile, 16384 values where loads of 16 bytes can be aligned and 4096 elsewhere; less for a short row."""
    vocabulary, stride = logits.shape[1], logits.stride(0)
    aligned = vocabulary % 16 == 0 and stride % 16 == 0 and logits.data_ptr() % 16 == 0
    vector = 16 // logits.element_size() if aligned else 1
    lanes = 4096 // vector if aligned else 1024  # with 2048 ptxas spills for sm_80 and sm_100
    needed = triton.next_power_of_2(triton.cdiv(vocabulary, UNROLL * vector))
    return {"LANES": max(32, min(lanes, needed)), "UNROLL": UNROLL, "VECTOR": vector}


def programs(logits: Tensor, writes_delta: bool) -> int:
    """Rows under way at a time. The delta reads its row twice, so no more than half the second-level cache holds."""
    rows, vocabulary = logits.shape
    if not writes_delta or not logits.is_cuda:
        return rows
    multiprocessors, cache_bytes = device_facts(logits.device.index)
    fit = cache_bytes // (2 * multiprocessors * vocabulary * logits.element_size())
    return min(rows, multiprocessors * max(1, min(fit, MOST_PROGRAMS)))


def _bias(transform: LogitTransform, logits: Tensor) -> tuple[Tensor]:
    return (logits if transform.bias is None else transform.bias.contiguous(),)  # without one nothing is read


def factors(transform: LogitTransform) -> tuple[float, float, float]:
    """`scale` and `cap` of triton_math.transformed, and the constant factor of dz/dx."""
    if transform.softcap:
        return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature, transform.slope
    return transform.slope, 0.0, transform.slope


def check_labels_where_free(like: Tensor, target: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Reads the labels only where no device has to be waited for, or where the user asks for it."""
    if not like.is_cuda or torch.is_anomaly_enabled():
        check_labels("target", target, ignore_index, vocabulary)
