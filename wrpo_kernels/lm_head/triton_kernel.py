"""Log-probs of a head, forward alone, by a Triton matrix product that writes no logits.

    launch 1   a program takes BLOCK_N rows and a range of the vocabulary, tile after tile:
               h W^T in float32 -> scores -> running log-sum-exp of each row, and the score of the row's target
    launch 2   the ranges' log-sum-exps of a row are merged in their order

The programs of one range run side by side, so that a tile of W comes from memory once and then from the second-level
cache. The scores are those of the float32 sums: the chunked passes round them to the type of the hidden states first.
It takes 1.5 to 1.9 times as long as the chunked passes, whose products are the vendor's (H200, see docs/log.md,
2026-11-26), so it runs where `backend="triton_fused"` names it: where even the budget of the chunks is too much.
Gradients take the chunked passes with the row kernels of `token_logp`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrpo_kernels.dispatch.triton_backend import multiprocessors
from wrpo_kernels.dispatch.triton_math import LOWEST, transformed
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import triton_kernel as row_kernels

delta_, forward = row_kernels.delta_, row_kernels.forward  # the chunked passes, for gradients

BLOCK_N, MERGED = 128, 256
PROGRAMS = 2  # a multiprocessor: the ranges are cut so that its last wave is half full at worst


@triton.jit(do_not_specialize=["N", "tiles_a_range"])
def _linear_token_logp_fwd(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V]
    target,  # [N] int64
    tops,  # [ranges, N] float32
    totals,  # [ranges, N] float32
    chosen,  # [N] float32, the score of the target
    N,
    V,
    D,
    stride_hn,
    stride_wv,
    tiles_a_range,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_rows = n < N
    k = tl.arange(0, BLOCK_K)
    h = hidden + n.to(tl.int64)[:, None] * stride_hn + k[None, :]  # [BLOCK_N, BLOCK_K]
    label = tl.load(target + n, mask=in_rows, other=-1)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mine = tl.zeros([BLOCK_N], tl.float32)
    first = tl.program_id(1) * tiles_a_range
    last = tl.minimum(first + tiles_a_range, tl.cdiv(V, BLOCK_V))
    for tile in range(first, last):
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        w = weight + v.to(tl.int64)[None, :] * stride_wv + k[:, None]  # [BLOCK_K, BLOCK_V]
        x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, D, BLOCK_K):
            in_width = start + k < D
            h_part = tl.load(h + start, mask=in_rows[:, None] & in_width[None, :], other=0.0)
            w_part = tl.load(w + start, mask=(v < V)[None, :] & in_width[:, None], other=0.0)
            x = tl.dot(h_part, w_part, x, input_precision="ieee")
        if HAS_BIAS:
            x += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        z, _bend = transformed(x, scale, cap, HAS_SOFTCAP)
        z = tl.where((v < V)[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
        mine += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
    place = tl.program_id(1).to(tl.int64) * N + n
    tl.store(tops + place, top, mask=in_rows)
    tl.store(totals + place, total, mask=in_rows)
    owns = (label >= first * BLOCK_V) & (label < last * BLOCK_V) & (label < V)
    tl.store(chosen + n, mine, mask=in_rows & owns)


@triton.jit(do_not_specialize=["N", "ranges", "ignore_index"])
def _merge_ranges_fwd(tops, totals, chosen, target, logp, N, V, ranges, ignore_index, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_rows = n < N
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(ranges):
        place = tl.cast(r, tl.int64) * N + n
        other = tl.load(tops + place, mask=in_rows, other=0.0)
        higher = tl.maximum(top, other)
        share = tl.load(totals + place, mask=in_rows, other=0.0) * tl.exp(other - higher)
        total = total * tl.exp(top - higher) + share
        top = higher
    label = tl.load(target + n, mask=in_rows, other=ignore_index)
    is_token = (label >= 0) & (label < V)
    score = tl.load(chosen + n, mask=in_rows & is_token, other=float("nan"))
    value = tl.where(label == ignore_index, 0.0, (score - top) - tl.log(total))
    tl.store(logp + n, value, mask=in_rows)


def logp_of_hidden(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor
) -> None:
    """Writes `logp` [N] of hidden [N, D], weight [V, D] and target [N]; a label out of range gives NaN on a GPU."""
    (num_rows, width), vocabulary = hidden.shape, weight.shape[0]
    if not num_rows:
        return
    row_kernels.check_labels_where_free(weight, target, ignore_index, vocabulary)
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    sizes = tiles(hidden.dtype, has_large_memory(hidden), transform.softcap > 0)
    num_tiles = triton.cdiv(vocabulary, sizes["BLOCK_V"])
    tiles_a_range = triton.cdiv(num_tiles, ranges(hidden, num_tiles))
    cuts = triton.cdiv(num_tiles, tiles_a_range)
    tops, totals = logp.new_empty(cuts, num_rows), logp.new_empty(cuts, num_rows)
    chosen = logp.new_empty(num_rows)
    scale, cap, _ = row_kernels.factors(transform)
    bias = weight if transform.bias is None else transform.bias.contiguous()
    with torch.cuda.device_of(hidden):
        _linear_token_logp_fwd[(triton.cdiv(num_rows, BLOCK_N), cuts)](
            *(hidden, weight, bias, target, tops, totals, chosen),
            *(num_rows, vocabulary, width, hidden.stride(0), weight.stride(0), tiles_a_range, scale, cap),
            HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.softcap > 0,
            BLOCK_N=BLOCK_N,
            **sizes,
            num_warps=8,
            enable_fp_fusion=True,
        )
        _merge_ranges_fwd[(triton.cdiv(num_rows, MERGED),)](
            *(tops, totals, chosen, target, logp, num_rows, vocabulary, cuts, ignore_index),
            BLOCK=MERGED,
            num_warps=4,
            enable_fp_fusion=True,
        )


def tiles(dtype: torch.dtype, has_large_memory: bool, has_softcap: bool) -> dict[str, int]:
    """One shape an architecture, none searched for: a search takes longer than a step.

    As large as ptxas fits into registers and into the shared memory: 128 KiB on Hopper and Blackwell servers, less
    than 64 elsewhere.
    """
    if dtype == torch.float32:
        return {"BLOCK_V": 64, "BLOCK_K": 32, "num_stages": 2}
    if has_large_memory:  # BLOCK_V = 256 takes 0.83 times as long on an H200, and spills with a softcap
        return {"BLOCK_V": 128, "BLOCK_K": 64, "num_stages": 4}
    return {"BLOCK_V": 64 if has_softcap else 128, "BLOCK_K": 32, "num_stages": 4}


def has_large_memory(tensor: Tensor) -> bool:
    """Compute capability 9.x and 10.x: 227 KiB of shared memory a program."""
    if not tensor.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)


def ranges(hidden: Tensor, num_tiles: int) -> int:
    number = multiprocessors(hidden.device.index) if hidden.is_cuda else 2
    return max(1, min(num_tiles, triton.cdiv(PROGRAMS * number, triton.cdiv(len(hidden), BLOCK_N))))
