"""The product whose epilogue stores powers of two: its Triton kernels.

    scores     z_y of each row's label, from a gathered dot product
    product    h W^T, tile after tile -> 2^(z - k) in bfloat16, and the sum of each row of a tile without its label
    finish     a row's sums -> its log-prob, and the label's own entry

Scores are in bits here: z log2(e). Programs of the product stay and walk over the tiles; GROUP tiles of rows take the
same stripe of W, so that it comes from the second-level cache. Operands are read by tensor descriptors where the device
and their strides allow it, else through masked pointers. All sums have a fixed order.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from wrpo_kernels.dispatch.triton_math import label_logp, transformed
from wrpo_kernels.lm_head.exp_product import form

OFFSET, LIMIT, LN2 = (tl.constexpr(number) for number in (form.OFFSET, form.LIMIT, math.log(2)))


@triton.jit
def _block(x, row, column, rows, columns, stride, IS_DESCRIPTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """x[row : row + R, column : column + C], zero outside of [rows, columns]."""
    if IS_DESCRIPTOR:
        return x.load([row, column])
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(x + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0)


@triton.jit
def _store_block(
    x, row, column, values, rows, columns, stride, IS_DESCRIPTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    if IS_DESCRIPTOR:
        x.store([row, column], values)
    else:
        r, c = row + tl.arange(0, R), column + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        tl.store(x + r.to(tl.int64)[:, None] * stride + c[None, :], values, mask=inside)


@triton.jit
def tile_scores(
    hidden,
    weight,
    low,
    up,
    bias,
    row,
    column,
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
    """Scores [BLOCK_N, BLOCK_V] in bits from this row and column on, and the bend of the softcap."""
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for k in range(0, D, BLOCK_K):
        h = _block(hidden, row, k, N, D, stride_hn, DESCRIPTORS, BLOCK_N, BLOCK_K)
        w = _block(weight, column, k, V, D, stride_wv, DESCRIPTORS, BLOCK_V, BLOCK_K)
        x = tl.dot(h, w.T, x)
    if HAS_ADAPTER:
        for k in range(0, rank, BLOCK_K):
            h = _block(low, row, k, N, rank, stride_ln, DESCRIPTORS, BLOCK_N, BLOCK_K)
            w = _block(up, column, k, V, rank, stride_uv, DESCRIPTORS, BLOCK_V, BLOCK_K)
            x = tl.dot(h, w.T, x)
    if HAS_BIAS:
        v = column + tl.arange(0, BLOCK_V)
        x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    return transformed(x, scale, cap, HAS_SOFTCAP)


@triton.jit
def _row_dot(a, b, width, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        one = tl.load(a + k, mask=k < width, other=0.0).to(tl.float32)
        total += one * tl.load(b + k, mask=k < width, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _label_score_fwd(
    hidden,  # [N, D]
    weight,  # [V, D]
    low,  # [N, r]
    up,  # [V, r]
    bias,  # [V]
    target,  # [N] int64
    score,  # [N] float32, in bits; NaN where the target is no token
    bend,  # [N] float32
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
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(target + n)
    is_token = (label >= 0) & (label < V)
    token = tl.where(is_token, label, 0)
    x = _row_dot(hidden + n * stride_hn, weight + token * stride_wv, D, BLOCK)
    if HAS_ADAPTER:
        x += _row_dot(low + n * stride_ln, up + token * stride_uv, rank, BLOCK)
    if HAS_BIAS:
        x += tl.load(bias + token).to(tl.float32)
    z, slope = transformed(x, scale, cap, HAS_SOFTCAP)
    # Beside an infinite score every other has the power 0, which would look like a certain label.
    tl.store(score + n, tl.where(is_token & (z < float("inf")), z, float("nan")))
    tl.store(bend + n, slope)


@triton.jit(do_not_specialize=["N"])
def _row_coefficients_fwd(coef, logp, out, N, stride, slope, ROWS: tl.constexpr):
    """coef [N] times -slope / S, by which a row of powers becomes one of the delta: 1 / S is p 2^OFFSET of the label.
    Where the powers left their range p itself stands in the row."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.load(logp + n, mask=n < N, other=0.0)
    scale = tl.where(value > LIMIT, tl.exp2(value / LN2 + OFFSET), 1.0)
    tl.store(out + n, tl.load(coef + n * stride, mask=n < N, other=0.0) * scale * -slope, mask=n < N)


@triton.jit(do_not_specialize=["N"])
def _exp_product_fwd(
    hidden,  # [N, D]
    weight,  # [V, D]
    low,  # [N, r]
    up,  # [V, r]
    bias,  # [V]
    target,  # [N] int64
    score,  # [N] float32
    out,  # [N, V] bfloat16
    sums,  # [tiles of V, N] float32, without the label
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
    STORES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_n, tiles_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        first = tile // (GROUP * tiles_v) * GROUP
        size = tl.minimum(tiles_n - first, GROUP)
        row = (first + tile % (GROUP * tiles_v) % size) * BLOCK_N
        tile_v = tile % (GROUP * tiles_v) // size
        column = tile_v * BLOCK_V
        z, bend = tile_scores(
            hidden, weight, low, up, bias, row, column, N, V, D, rank, stride_hn, stride_wv, stride_ln, stride_uv,
            scale, cap, HAS_BIAS, HAS_SOFTCAP, HAS_ADAPTER, DESCRIPTORS, BLOCK_N, BLOCK_V, BLOCK_K,
        )  # fmt: skip
        n = row + tl.arange(0, BLOCK_N)
        offset = tl.load(score + n, mask=n < N, other=0.0) + OFFSET
        label = tl.load(target + n, mask=n < N, other=-1).to(tl.int32)
        # Of a stack of tiles few hold a label, one the end of the vocabulary; the others are taken as they are.
        if (tl.max((label // BLOCK_V == tile_v).to(tl.int32), 0) > 0) | (column + BLOCK_V > V):
            v = column + tl.arange(0, BLOCK_V)
            z = tl.where((v < V)[None, :] & (v[None, :] != label[:, None]), z, float("-inf"))
        power = tl.exp2(z - offset[:, None])
        total = tl.sum(power, 1)
        tl.store(sums + tile_v.to(tl.int64) * N + n, total, mask=n < N)
        if STORES:
            power *= bend
            if SPLIT == 2:
                halves = tl.permute(tl.reshape(power, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                half: tl.constexpr = BLOCK_V // 2
                _store_block(
                    out, row, column, left.to(tl.bfloat16), N, V, stride_on, DESCRIPTORS, BLOCK_N, half
                )  # fmt: skip
                _store_block(
                    out, row, column + half, right.to(tl.bfloat16), N, V, stride_on, DESCRIPTORS, BLOCK_N, half
                )  # fmt: skip
            else:
                _store_block(
                    out, row, column, power.to(tl.bfloat16), N, V, stride_on, DESCRIPTORS, BLOCK_N, BLOCK_V
                )  # fmt: skip


@triton.jit(do_not_specialize=["N", "tiles", "ignore_index"])
def _exp_finish_fwd(
    sums,  # [tiles of V, N] float32
    score,  # [N] float32
    bend,  # [N] float32
    target,  # [N] int64
    out,  # [N, V]
    logp,  # [N] float32
    N,
    V,
    tiles,
    stride_on,
    ignore_index,
    STORES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = n < N
    others = tl.zeros([ROWS], tl.float32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        place = sums + t.to(tl.int64)[:, None] * N + n[None, :]
        others += tl.sum(tl.load(place, mask=(t < tiles)[:, None] & in_rows[None, :], other=0.0), 0)
    z = tl.load(score + n, mask=in_rows, other=0.0)
    relative = z - (z + OFFSET)  # -OFFSET but for the rounding of the offset
    value = label_logp(relative * LN2, tl.exp2(relative), others)
    label = tl.load(target + n, mask=in_rows, other=-1)
    ignored = in_rows & (label == ignore_index)
    tl.store(logp + n, tl.where(ignored, 0.0, value), mask=in_rows)
    if STORES:
        row = out + n.to(tl.int64) * stride_on
        slope = tl.load(bend + n, mask=in_rows, other=0.0)
        is_token = in_rows & (label >= 0) & (label < V)
        tl.store(row + tl.where(is_token, label, 0), (-others * slope).to(tl.bfloat16), mask=is_token)
        if tl.max(ignored.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # an ignored token's entry may have been written by another thread
            for start in range(0, V, TILES):
                v = start + tl.arange(0, TILES)
                zero = tl.zeros([ROWS, TILES], tl.bfloat16)
                tl.store(row[:, None] + v[None, :], zero, mask=ignored[:, None] & (v < V)[None, :])
