"""Rows whose powers left the safe range, done again with the log-sum-exp of the row as offset: three launches.

Which rows those are only the device knows. So the launches are always made, and a program returns at once where none of
its rows is concerned: the host waits for nothing. In the rows that are left behind stands p itself.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from wrpo_kernels.dispatch.triton_math import LOWEST
from wrpo_kernels.lm_head.exp_product import form
from wrpo_kernels.lm_head.exp_product.product import tile_scores

LIMIT, LN2 = tl.constexpr(form.LIMIT), tl.constexpr(math.log(2))


@triton.jit
def _rows_that_left(logp, N, ROWS: tl.constexpr):
    """Of a program: its first row, all its rows, which of them left the range, and whether any did.

    Their sum of powers overflowed, or is so large that it might in a product; or it is NaN.
    """
    row = tl.program_id(0) * ROWS
    n = row + tl.arange(0, ROWS)
    wrong = (n < N) & ~(tl.load(logp + n, mask=n < N, other=0.0) > LIMIT)
    return row, n, wrong, tl.max(wrong.to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["N"])
def _exp_repair_sums_fwd(
    hidden,
    weight,
    low,
    up,
    bias,
    logp,  # [N] float32
    tops,  # [tiles of V, N] float32
    totals,  # [tiles of V, N] float32
    N,
    V,
    D,
    rank,
    stride_hn,
    stride_wv,
    stride_ln,
    stride_uv,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, n, wrong, is_concerned = _rows_that_left(logp, N, BLOCK_N)
    if is_concerned:
        for tile_v in range(tl.program_id(1), tl.cdiv(V, BLOCK_V), tl.num_programs(1)):
            z, _bend = tile_scores(
                hidden, weight, low, up, bias, row, tile_v * BLOCK_V, N, V, D, rank, stride_hn, stride_wv, stride_ln,
                stride_uv, scale, cap, HAS_BIAS, HAS_SOFTCAP, HAS_ADAPTER, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
            z = tl.where((v < V)[None, :], z, float("-inf"))
            top = tl.maximum(tl.max(z, 1), LOWEST)
            place = tl.cast(tile_v, tl.int64) * N + n
            tl.store(tops + place, top, mask=wrong)
            tl.store(totals + place, tl.sum(tl.exp2(z - top[:, None]), 1), mask=wrong)


@triton.jit(do_not_specialize=["N", "tiles"])
def _exp_repair_merge_fwd(
    tops,  # [tiles of V, N] float32
    totals,  # [tiles of V, N] float32
    score,  # [N] float32
    logp,  # [N] float32
    lse,  # [N] float32, in bits
    N,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    _row, n, wrong, is_concerned = _rows_that_left(logp, N, ROWS)
    if is_concerned:
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for first in range(0, tiles, TILES):
            t = first + tl.arange(0, TILES)
            place = t.to(tl.int64)[:, None] * N + n[None, :]
            there = (t < tiles)[:, None] & wrong[None, :]
            other = tl.load(tops + place, mask=there, other=LOWEST)
            higher = tl.maximum(top, tl.max(other, 0))
            share = tl.load(totals + place, mask=there, other=0.0) * tl.exp2(other - higher[None, :])
            total = total * tl.exp2(top - higher) + tl.sum(share, 0)
            top = higher
        z = tl.load(score + n, mask=wrong, other=0.0)
        whole = tl.where(z == z, top + tl.log2(total), float("nan"))
        value = (z - whole) * LN2
        # At most the limit: the coefficients and the last launch tell by it which rows hold p itself.
        tl.store(logp + n, tl.where(value > LIMIT, LIMIT, value), mask=wrong)
        tl.store(lse + n, whole, mask=wrong)


@triton.jit(do_not_specialize=["N"])
def _exp_repair_store_fwd(
    hidden,
    weight,
    low,
    up,
    bias,
    target,
    bend,
    logp,
    lse,
    out,  # [N, V], always a pointer: rows beside a repaired one stay as they are
    N,
    V,
    D,
    rank,
    stride_hn,
    stride_wv,
    stride_ln,
    stride_uv,
    stride_on,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, n, wrong, is_concerned = _rows_that_left(logp, N, BLOCK_N)
    if is_concerned:
        whole = tl.load(lse + n, mask=wrong, other=0.0)
        label = tl.load(target + n, mask=wrong, other=-1)
        is_token = wrong & (label >= 0) & (label < V)
        label = label.to(tl.int32)
        for tile_v in range(tl.program_id(1), tl.cdiv(V, BLOCK_V), tl.num_programs(1)):
            z, bend_of = tile_scores(
                hidden, weight, low, up, bias, row, tile_v * BLOCK_V, N, V, D, rank, stride_hn, stride_wv, stride_ln,
                stride_uv, scale, cap, HAS_BIAS, HAS_SOFTCAP, HAS_ADAPTER, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
            p = tl.exp2(z - whole[:, None]) * bend_of
            rows = out + n.to(tl.int64) * stride_on
            tl.store(rows[:, None] + v[None, :], p.to(tl.bfloat16), mask=wrong[:, None] & (v < V)[None, :])
            holds = is_token & (label // BLOCK_V == tile_v)
            if tl.max(holds.to(tl.int32), 0) > 0:
                tl.debug_barrier()  # the label's entry was written by another thread
                mine = -tl.load(bend + n, mask=holds, other=0.0) + 0.0 * whole  # 1 - p is 1; NaN where the row is
                tl.store(rows + label, mine.to(tl.bfloat16), mask=holds)
