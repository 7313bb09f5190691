"""The columns of delta that count: what a trained model leaves of the second and third product of its head.

A trained model gives nearly all of a row's probability to a few tokens, so nearly all of delta [n, V] is tiny. Let U be
the tokens that are the target of no row and have |delta[t, v]| < eps in every row of a chunk. Without their columns

    dh_t = c_t sum_{v not in U} delta_tv W_v          |error of dh_t| <= |c_t| eps sum_{v in U} |W_v|
    dW_v = sum_t c_t delta_tv h_t, 0 for v in U       |error of dW_v| <= eps sum_t |c_t| |h_t| for v in U, else 0

by the triangle inequality, in any norm; the sums over t run over the rows of the chunk, and over chunks they add up. As
the dropped |delta_tv| of a row are probabilities, they also add up to 1 at most (times the slope of the transform).
The products of what is left take |not U| / V of the time of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.lm_head import products

LARGEST_SHARE = 0.5  # share of the columns above which gathering them saves nothing


def columns_that_count(delta: Tensor, target: Tensor, eps: float) -> Tensor | None:
    """[K] int64 in rising order; None without a filter, or where so many count that all of them may as well."""
    if not eps:
        return None
    # Two reads; torch.aminmax(dim=0) takes four times as long (2 cores with AVX2, 2026-11-24).
    counts = ~((delta.amin(0) > -eps) & (delta.amax(0) < eps))  # NaN counts
    counts[target.clamp(0, delta.shape[1] - 1)] = True
    columns = counts.nonzero()[:, 0]
    return columns if columns.shape[0] <= LARGEST_SHARE * delta.shape[1] else None


def grad_hidden_into(out: Tensor, delta: Tensor, weight: Tensor, columns: Tensor | None) -> Tensor:
    """out [n, D] = delta[:, columns] @ weight[columns]; a sum of several stripes is kept in float32."""
    if columns is None:
        return products.grad_hidden_into(out, delta, weight)
    total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for part in _stripes(columns, delta, weight.shape[1]):
        total += products.grad_hidden_into(out, delta.index_select(1, part), weight.index_select(0, part))
    return out.copy_(total)


def add_grad_weight(total: Tensor, delta: Tensor, scaled: Tensor, columns: Tensor) -> None:
    """total [V, D] += delta^T @ scaled in the rows `columns` alone."""
    is_wide = total.dtype != delta.dtype and products.writes_float32(delta)
    for part in _stripes(columns, delta, scaled.shape[1]):
        some = delta.index_select(1, part)
        share = torch.empty(
            part.shape[0], scaled.shape[1], dtype=total.dtype if is_wide else delta.dtype, device=delta.device
        )
        if is_wide:
            products.add_grad_weight(share, some, scaled, first=True)
        else:
            products.grad_weight_into(share, some, scaled)
        total.index_add_(0, part, share.to(total.dtype))


def _stripes(columns: Tensor, delta: Tensor, width: int) -> tuple[Tensor, ...]:
    """Parts whose [part, D] and [n, part] stay within the scratch of a stripe."""
    return columns.split(products.stripe_of(max(width, delta.shape[0]), delta.dtype))
