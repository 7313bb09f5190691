"""The statistics of rows of logits by Triton kernels: a row is read once, whatever is asked of it.

    forward    the tiles of `token_logp`, in their order, so that log-probs have the same bits; beside each lane's
               log-sum-exp stand sum d e^d, sum e^2d and sum z of the scores z, with d = z - highest, and the first
               column of the highest
    backward   a program takes BLOCK logits of a row and leaves their gradient in their place

With S = sum e^d the entropy is log S - (sum d e^d) / S: two terms that are not negative, so nothing cancels.
What is not asked for is no part of the compiled kernel. Wrong labels are as in `token_logp`: NaN in all values of the
row and in its gradient, and no top token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrpo_kernels.dispatch.triton_math import FARTHEST, rebased
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.triton_kernel import (
    BLOCK,
    NUM_WARPS,
    bias_of,
    check_labels_where_free,
    delta_of,
    factors,
    load_scores_within,
    store_logp,
    sums_of_others,
    tile,
    with_label,
)

ROW = tl.constexpr(len(COLUMNS))
LOGP, LSE, ENTROPY, MEAN, SQUARES, REST = (tl.constexpr(column) for column in range(len(COLUMNS)))


@triton.jit(do_not_specialize=["ignore_index"])
def _token_statistics_fwd(
    logits,  # [N, V]
    target,  # [N] int64
    bias,  # [V]
    values,  # [N, 6] float32, COLUMNS
    top1,  # [N] int64
    V,
    stride_n,
    ignore_index,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride_n
    value = values + n * ROW
    label = tl.load(target + n)
    is_token = (label >= 0) & (label < V)
    entropy, mean, log_squares, best = 0.0, 0.0, 0.0, -1
    if label == ignore_index:
        tl.store(value + LOGP, 0.0)
        tl.store(value + LSE, 0.0)
        tl.store(value + REST, 0.0)
    else:
        token = tl.where(is_token, label, 0).to(tl.int32)
        chosen, _bend = load_scores_within(row, bias, token, is_token, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        highest_other, sum_of_others, first, squares, scores, column = sums_of_others(
            row, bias, token, V, scale, cap, HAS_BIAS, HAS_SOFTCAP, LANES, UNROLL, VECTOR,
            HAS_ENTROPY, HAS_MEAN, HAS_SQUARES, HAS_TOP1,
        )  # fmt: skip
        highest, mine, missed, whole = with_label(chosen, highest_other, sum_of_others, is_token)
        store_logp(value + LOGP, value + LSE, REST - LSE, chosen, highest, mine, missed, whole, is_token)
        if HAS_ENTROPY or HAS_SQUARES:
            first, squares = rebased(first, squares, sum_of_others, highest_other - highest)
        if HAS_ENTROPY:
            first += mine * tl.maximum(chosen - highest, FARTHEST)
            entropy = tl.log(whole) - first / whole
        if HAS_MEAN:
            mean = tl.where(is_token, (scores + chosen) / V, float("nan"))
        if HAS_SQUARES:
            log_squares = tl.log(squares + mine * mine) - 2.0 * tl.log(whole)
        if HAS_TOP1:
            is_first = (chosen > highest_other) | ((chosen == highest_other) & (token < column))
            best = tl.where(is_token, tl.where(is_first, token, tl.minimum(column, V - 1)), -1)  # V - 1: all are NaN
    tl.store(value + ENTROPY, entropy)
    tl.store(value + MEAN, mean)
    tl.store(value + SQUARES, log_squares)
    tl.store(top1 + n, best)


@triton.jit(do_not_specialize=["ignore_index"])
def _token_statistics_bwd(
    logits,  # [N, V], becomes its gradient
    target,  # [N] int64
    bias,  # [V]
    values,  # [N, 6] float32, COLUMNS
    coef,  # [N, 6] float32, the upstream gradients of the first five
    V,
    stride_n,
    ignore_index,
    scale,
    cap,
    slope,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = logits + n * stride_n
    label = tl.load(target + n)
    if label == ignore_index:
        tl.store(row + cols, tl.zeros([BLOCK], row.dtype.element_ty), mask=cols < V)
    else:
        value, c = values + n * ROW, coef + n * ROW
        z, bend = load_scores_within(row, bias, cols, cols < V, scale, cap, HAS_BIAS, HAS_SOFTCAP)
        log_p = (z - tl.load(value + LSE)) - tl.load(value + REST)
        p = tl.exp(log_p)
        grad = tl.load(c + LOGP) * delta_of(cols == label, tl.load(value + LOGP), p)
        inner = tl.load(c + LSE)
        if HAS_ENTROPY:
            inner -= tl.load(c + ENTROPY) * (tl.maximum(log_p, FARTHEST) + tl.load(value + ENTROPY))
        if HAS_SQUARES:
            inner += 2.0 * tl.load(c + SQUARES) * (p * tl.exp(-tl.load(value + SQUARES)) - 1.0)
        grad += p * inner
        if HAS_MEAN:
            grad += tl.load(c + MEAN) / V
        grad *= slope * bend
        tl.store(row + cols, grad.to(row.dtype.element_ty), mask=cols < V)


def statistics(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    wanted: Wanted,
    values: Tensor,
    top1: Tensor,
) -> None:
    """Writes `values` [N, 6] of COLUMNS and `top1` [N]."""
    check_labels_where_free(logits, target, ignore_index, logits.shape[1])
    rows_kernel(logits, target, ignore_index, transform, wanted, values, top1)


def rows_kernel(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    wanted: Wanted,
    values: Tensor,
    top1: Tensor,
) -> None:
    if not len(logits):
        return
    scale, cap, _ = factors(transform)
    with torch.cuda.device_of(logits):
        _token_statistics_fwd[(len(logits),)](
            *(logits, target, bias_of(transform, logits), values, top1),
            *(logits.shape[1], logits.stride(0), ignore_index, scale, cap),
            **_flags(transform, wanted),
            HAS_TOP1=wanted.top1,
            **tile(logits),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


def grad_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    wanted: Wanted,
    values: Tensor,
    coef: Tensor,
) -> None:
    """Overwrites the logits with the gradient of sum_k coef[n, k] values[n, k], of the first five columns."""
    num_rows, vocabulary = logits.shape
    if not num_rows:
        return
    with torch.cuda.device_of(logits):
        _token_statistics_bwd[(num_rows, triton.cdiv(vocabulary, BLOCK))](
            *(logits, target, bias_of(transform, logits), values, coef),
            *(vocabulary, logits.stride(0), ignore_index, *factors(transform)),
            **_flags(transform, wanted),
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )


def _flags(transform: LogitTransform, wanted: Wanted) -> dict[str, bool]:
    return {
        "HAS_BIAS": transform.bias is not None,
        "HAS_SOFTCAP": transform.softcap > 0,
        "HAS_ENTROPY": wanted.entropy,
        "HAS_MEAN": wanted.mean_logits,
        "HAS_SQUARES": wanted.log_sum_sq_probs,
    }
