"""The arithmetic of one row, shared by the Triton kernels: the transform of a logit and the running log-sum-exp.

All of it is float32 and in nats. A running log-sum-exp is a pair (top, total) that stands for `top + log(total)`; it is
kept per lane, so that the loop over a row needs no exchange between threads, and the lanes are merged once a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A finite floor: exp(-inf - LOWEST) is 0, where exp(-inf - (-inf)) would be NaN. A row of -inf alone still gives NaN.
LOWEST = tl.constexpr(-3.4e38)
# A distance at which e^distance is 0 in float32: 0 times -inf would be NaN.
FARTHEST = tl.constexpr(-1e4)
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def tanh_with_slope(u):
    """tanh(u), and 1 - tanh(u)^2 without the cancellation where tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(u))
    q = 1.0 / (1.0 + e)
    value = (1.0 - e) * q
    return tl.where(u < 0, -value, value), 4.0 * e * q * q


@triton.jit
def transformed(x, scale, cap, HAS_SOFTCAP: tl.constexpr):
    """The score z of a logit (bias already added), and dz/dx without the constant factor of the slope.

    Without a softcap z = scale * x; with one z = cap * tanh(scale * x).
    """
    if HAS_SOFTCAP:
        value, bend = tanh_with_slope(x * scale)
        z = value * cap
    else:
        z = x * scale
        bend = 1.0
    return z, bend


@triton.jit
def tile_columns(LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a tile [UNROLL, LANES, VECTOR]: neighbours are VECTOR values of one lane, which one load brings."""
    by_load = tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
    return by_load + tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def take_in(top, total, z):
    """The running log-sum-exp [LANES] after the scores z [UNROLL, LANES, VECTOR].

    One exponential a score and one a lane: two a score would be all that an H100 can compute in the time it reads one.
    """
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    grown = tl.sum(tl.sum(tl.exp(z - higher[None, :, None]), 2), 0)
    return higher, total * tl.exp(top - higher) + grown


@triton.jit
def merged(top, total):
    """The lanes' log-sum-exps [LANES] as one."""
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def rebased(first, squares, total, by):
    """sum d e^d and sum e^2d of the distances d, total = sum e^d, where all of these become d + by, by <= 0."""
    by = tl.maximum(by, FARTHEST)
    share = tl.exp(by)
    return share * (first + by * total), share * share * squares


@triton.jit
def first_column(z, highest, start):
    """The first column [LANES] of a tile z [UNROLL, LANES, VECTOR] where a score is the `highest` [LANES].

    Found by its place in the lane, whose numbers are constants: columns of all scores would take 16 registers a thread.
    """
    UNROLL: tl.constexpr = z.shape[0]
    LANES: tl.constexpr = z.shape[1]
    VECTOR: tl.constexpr = z.shape[2]
    places = tl.arange(0, UNROLL)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    place = tl.min(tl.min(tl.where(z == highest[None, :, None], places, UNROLL * VECTOR), 2), 0)
    of_lane = tl.min(tl.min(tile_columns(LANES, UNROLL, VECTOR), 2), 0)
    column = start + of_lane + place // VECTOR * (LANES * VECTOR) + place % VECTOR
    return tl.where(place < UNROLL * VECTOR, column, NO_COLUMN)


@triton.jit
def take_in_statistics(
    first,
    squares,
    scores,
    column,
    top,
    total,
    z,
    counted,
    start,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_TOP1: tl.constexpr,
):
    """With d = score - highest one: sum d e^d, sum e^2d, sum of scores and first column of the highest one, [LANES]
    each, after the scores z of the tile that starts at column `start`. `top` and `total` are those before; `counted`
    is z, and 0 where it is no score.
    """
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    if HAS_ENTROPY or HAS_SQUARES:
        distance = z - higher[None, :, None]
        e = tl.exp(distance)
        first, squares = rebased(first, squares, total, top - higher)
        if HAS_ENTROPY:
            first += tl.sum(tl.sum(e * tl.maximum(distance, FARTHEST), 2), 0)
        if HAS_SQUARES:
            squares += tl.sum(tl.sum(e * e, 2), 0)
    if HAS_MEAN:
        scores += tl.sum(tl.sum(counted, 2), 0)
    if HAS_TOP1:
        here = first_column(z, higher, start)
        column = tl.minimum(tl.where(higher > top, NO_COLUMN, column), here)
    return first, squares, scores, column


@triton.jit
def merged_statistics(first, squares, scores, column, top, total):
    """The lanes' statistics [LANES] as those of all, beside `merged(top, total)`."""
    highest = tl.max(top, 0)
    first, squares = rebased(first, squares, total, top - highest)
    column = tl.min(tl.where(top == highest, column, NO_COLUMN), 0)
    return tl.sum(first, 0), tl.sum(squares, 0), tl.sum(scores, 0), column


@triton.jit
def label_logp(relative, mine, rest):
    """log p of a label whose score, relative to some reference, has the term `mine` in a sum whose others are `rest`.

    Where the label is nearly certain it is -log(1 + e), e = rest / mine, by the series of artanh(e / (2 + e)): the
    logarithm of a GPU has no digits next to 1. Error of the series 2e-8, relative.
    """
    s = rest / tl.where(mine > rest, 2.0 * mine + rest, 1.0)  # at most 1/3
    q = s * s
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13))))))
    return tl.where(mine > rest, -2.0 * s * series, relative - tl.log(mine + rest))


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0, without the cancellation near 0: there by its series, error 3e-8, relative."""
    y = tl.maximum(x, -0.5)
    series = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6 * (1.0 + y / 7)))))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1], exact where 1 + e rounds: the quotient takes the rounding out again."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logistic(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, 1.0, e) / (1.0 + e)
