"""`token_logp` by Triton kernels: a row of logits is read once, and its delta written in place in the same launch.

    pass 1   tile after tile of a row -> running log-sum-exp of each lane, merged once at the end; without the label,
             whose term would hide the others where it is nearly certain, so the tile that holds it comes last
    pass 2   (delta only) the same tiles, last one first: what was read last is still in the second-level cache; the
             label's own element last

The other whole tiles are read without a mask: a comparison and a choice for each score would take a fifth of the time.

A label outside [0, V) that is not `ignore_index` cannot raise without waiting for the device: its row is NaN in logp,
lse and delta. Under anomaly detection, and on the CPU, the labels are read first and a wrong one raises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrpo_kernels.checks import check_labels
from wrpo_kernels.dispatch.triton_backend import multiprocessors
from wrpo_kernels.dispatch.triton_math import (
    LOWEST,
    NO_COLUMN,
    label_logp,
    merged,
    merged_statistics,
    one_minus_exp,
    take_in,
    take_in_statistics,
    tile_columns,
    transformed,
)
from wrpo_kernels.logit_transform import LogitTransform

# 8 warps with two loads of 16 bytes a thread under way. Beside a copy of the same bytes the forward takes 0.99 to 1.13
# times as long and the delta 1.4 to 1.65; with 16 warps and four loads, 1.1 to 1.6 and 2.0 to 3.0 (H200, V = 32000 to
# 262144, see docs/log.md, 2026-11-26).
UNROLL, NUM_WARPS = 2, 8
BLOCK = 4096  # of a row, in the out-of-place gradient
PROGRAMS = 4  # a multiprocessor, each with a row of delta under way; with two of them it takes 1.3 times as long


@triton.jit
def load_scores(row, bias, cols, scale, cap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Scores of a row at `cols`, all of which it has, and the bend of the softcap there."""
    x = tl.load(row + cols).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + cols).to(tl.float32)
    return transformed(x, scale, cap, HAS_SOFTCAP)


@triton.jit
def load_scores_within(row, bias, cols, in_row, scale, cap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The same, -inf where `cols` are not `in_row`."""
    x = tl.load(row + cols, mask=in_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + cols, mask=in_row, other=0.0).to(tl.float32)
    z, bend = transformed(x, scale, cap, HAS_SOFTCAP)
    return tl.where(in_row, z, float("-inf")), bend


@triton.jit
def _fill_zero(row, V, within, TILE: tl.constexpr):
    for tile in range(tl.cdiv(V, TILE)):
        cols = tile * TILE + within
        tl.store(row + cols, tl.zeros_like(within).to(row.dtype.element_ty), mask=cols < V)


@triton.jit
def sums_of_others(
    row,
    bias,
    token,
    V,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr = False,
    HAS_MEAN: tl.constexpr = False,
    HAS_SQUARES: tl.constexpr = False,
    HAS_TOP1: tl.constexpr = False,
):
    """Over the scores z of a row but for that of `token`: the highest one, and with d = z - highest sum e^d, sum d e^d,
    sum e^2d, sum z and the first column of the highest; the last four only where they are asked for."""
    TILE: tl.constexpr = UNROLL * LANES * VECTOR
    within = tile_columns(LANES, UNROLL, VECTOR)  # [UNROLL, LANES, VECTOR]
    whole_tiles = V // TILE
    top = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    first, squares, scores = total, total, total
    column = tl.full([LANES], NO_COLUMN, tl.int32)
    label_tile = token // TILE  # `whole_tiles` where the label is in the rest
    masked_tiles = tl.where(label_tile < whole_tiles, 2, 1)
    for step in range(whole_tiles + 1 - masked_tiles):
        start = tl.where(step < label_tile, step, step + 1) * TILE
        z, _bend = load_scores(row, bias, start + within, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        first, squares, scores, column = take_in_statistics(
            first, squares, scores, column, top, total, z, z, start, HAS_ENTROPY, HAS_MEAN, HAS_SQUARES, HAS_TOP1
        )
        top, total = take_in(top, total, z)
    for step in range(masked_tiles):
        start = tl.where(step == 0, whole_tiles, label_tile) * TILE
        cols = start + within
        others = (cols < V) & (cols != token)
        z, _bend = load_scores_within(row, bias, cols, others, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        counted = tl.where(others, z, 0.0)
        first, squares, scores, column = take_in_statistics(
            first, squares, scores, column, top, total, z, counted, start, HAS_ENTROPY, HAS_MEAN, HAS_SQUARES, HAS_TOP1
        )
        top, total = take_in(top, total, z)
    if HAS_ENTROPY or HAS_MEAN or HAS_SQUARES or HAS_TOP1:
        first, squares, scores, column = merged_statistics(first, squares, scores, column, top, total)
    highest, total = merged(top, total)
    return highest, total, first, squares, scores, column


@triton.jit
def with_label(chosen, highest_other, sum_of_others, is_token):
    """The highest score, the label's own term and those of the others relative to it, and their sum; NaN where the
    label is no token."""
    highest = tl.maximum(highest_other, chosen)
    mine, missed = tl.exp(chosen - highest), sum_of_others * tl.exp(highest_other - highest)
    return highest, mine, missed, tl.where(is_token, mine + missed, float("nan"))


@triton.jit
def store_logp(logp, lse, stride_half, chosen, highest, mine, missed, whole, is_token):
    """The log-prob at `logp`; the log-sum-exp as a sum of two, at `lse` and stride_half further on."""
    log_whole = tl.log(whole)
    log_sum = highest + log_whole
    tl.store(logp, tl.where(is_token, label_logp(chosen - highest, mine, missed), float("nan")))
    tl.store(lse, log_sum)
    tl.store(lse + stride_half, (highest - log_sum) + log_whole)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _token_logp_fwd(
    logits,  # [N, V], becomes delta if WRITES_DELTA
    target,  # [N] int64
    bias,  # [V]
    logp,  # [N] float32
    lse,  # [2, N] float32, log-sum-exp as a sum of two
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
    whole_tiles = V // TILE
    rest = whole_tiles * TILE + within
    for n in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = logits + tl.cast(n, tl.int64) * stride_n
        label = tl.load(target + n)
        if label == ignore_index:
            tl.store(logp + n, 0.0)
            tl.store(lse + n, 0.0)
            tl.store(lse + num_rows + n, 0.0)
            if WRITES_DELTA:
                _fill_zero(row, V, within, TILE)
        else:
            is_token = (label >= 0) & (label < V)
            token = tl.where(is_token, label, 0).to(tl.int32)
            chosen, chosen_bend = load_scores_within(row, bias, token, is_token, scale, cap, HAS_BIAS, HAS_SOFTCAP)
            highest_other, sum_of_others, _first, _squares, _scores, _column = sums_of_others(
                row, bias, token, V, scale, cap, HAS_BIAS, HAS_SOFTCAP, LANES, UNROLL, VECTOR
            )
            highest, mine, missed, whole = with_label(chosen, highest_other, sum_of_others, is_token)
            store_logp(logp + n, lse + n, num_rows, chosen, highest, mine, missed, whole, is_token)
            if WRITES_DELTA:
                share = -slope / whole
                z, bend = load_scores_within(row, bias, rest, rest < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
                delta = tl.exp(z - highest) * (share * bend)
                tl.store(row + rest, delta.to(row.dtype.element_ty), mask=rest < V)
                for step in range(whole_tiles):
                    cols = (whole_tiles - 1 - step) * TILE + within
                    z, bend = load_scores(row, bias, cols, scale, cap, HAS_BIAS, HAS_SOFTCAP)
                    delta = tl.exp(z - highest) * (share * bend)
                    tl.store(row + cols, delta.to(row.dtype.element_ty))
                tl.debug_barrier()  # the label's element was written by another thread
                delta = slope * (missed / whole) * chosen_bend
                tl.store(row + token, delta.to(row.dtype.element_ty), mask=is_token)


@triton.jit
def delta_of(is_label, logp, p):
    """d logp / dz of scores with the probabilities p."""
    return tl.where(is_label, one_minus_exp(logp), -p)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _token_logp_bwd(
    logits,  # [N, V]
    target,  # [N] int64
    bias,  # [V]
    logp,  # [N] float32
    lse,  # [2, N] float32
    grad_logp,  # [N] float32
    grad_logits,  # [N, V]; may be logits
    num_rows,
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
        z, bend = load_scores_within(row, bias, cols, cols < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        p = tl.exp((z - tl.load(lse + n)) - tl.load(lse + num_rows + n))
        delta = delta_of(cols == label, tl.load(logp + n), p)
        delta *= tl.load(grad_logp + n) * slope * bend
        tl.store(out + cols, delta.to(out.dtype.element_ty), mask=cols < V)


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """Writes `logp` [N] and `lse` [2, N]."""
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
            bias_of(transform, logits),
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
    logp: Tensor,
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
            bias_of(transform, logits),
            logp,
            lse,
            grad_logp,
            grad_logits,
            num_rows,
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
    """Shape of a tile: loads of 16 bytes where they can be aligned, of one value elsewhere; less for a short row."""
    vocabulary, stride = logits.shape[1], logits.stride(0)
    aligned = vocabulary % 16 == 0 and stride % 16 == 0 and logits.data_ptr() % 16 == 0
    vector = 16 // logits.element_size() if aligned else 1
    lanes = 32 * NUM_WARPS if aligned else 1024
    needed = triton.next_power_of_2(triton.cdiv(vocabulary, UNROLL * vector))
    return {"LANES": max(32, min(lanes, needed)), "UNROLL": UNROLL, "VECTOR": vector}


def programs(logits: Tensor, writes_delta: bool) -> int:
    """Rows under way at a time. The delta reads its row twice, so the cache should still hold the start of the row."""
    if not writes_delta or not logits.is_cuda:
        return len(logits)
    return min(len(logits), PROGRAMS * multiprocessors(logits.device.index))


def bias_of(transform: LogitTransform, logits: Tensor) -> Tensor:
    return logits if transform.bias is None else transform.bias.contiguous()  # without one nothing is read


def factors(transform: LogitTransform) -> tuple[float, float, float]:
    """`scale` and `cap` of triton_math.transformed, and the constant factor of dz/dx."""
    if transform.softcap:
        return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature, transform.slope
    return transform.slope, 0.0, transform.slope


def check_labels_where_free(like: Tensor, target: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Reads the labels only where no device has to be waited for, or where the user asks for it."""
    if not like.is_cuda or torch.is_anomaly_enabled():
        check_labels("target", target, ignore_index, vocabulary)
