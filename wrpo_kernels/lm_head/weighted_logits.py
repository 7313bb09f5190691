"""Means of logits in which each token has a weight of its own, where a softcap or an adapter forbids to weigh the
rows of the head instead."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wrpo_kernels.lm_head.budget import check_budget
from wrpo_kernels.lm_head.head import no_autocast
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.contract import logp_dtype
from wrpo_kernels.token_logp.reference import scores_of

ROWS_OF_SCORES = 4  # the scores, their transform and the gradients of both, in the backward of a chunk


def weighted_mean_logits(
    hidden: Tensor,
    weight: Tensor,
    adapter: tuple[Tensor, Tensor] | None,
    transform: LogitTransform,
    logits_dtype: torch.dtype | None,
    class_weight: Tensor,
    counts: Tensor,
    budget_bytes: int | None,
) -> Tensor:
    """[...] 1/V sum_v class_weight[v] z[n, v] where `counts` [...], else 0; differentiable in all but the weights.

    A chunk of rows within a quarter of the budget at a time, beside what other ops keep in it; their logits are made
    again in the backward: 2NDV flops forward alone, 8NDV with the gradients of both operands.
    """
    rows, products, wide = counts.reshape(-1).nonzero()[:, 0], hidden.dtype, logp_dtype(hidden.dtype)
    budget = check_budget(budget_bytes, hidden.device) // 4
    step = max(1, budget // (ROWS_OF_SCORES * wide.itemsize * len(weight)))

    def of_head(x: Tensor | None) -> Tensor | None:
        """Rounded to the type of the products, but wide, so that what the chunks give is added up in float32."""
        return None if x is None else x.to(products).to(wide)

    def of_rows(x: Tensor, low: Tensor | None) -> Tensor:
        with no_autocast(hidden):
            x = x.to(logits_dtype or products)
            scores = x @ head.to(x.dtype).t()
            if low is not None:
                scores = scores + low.to(products).to(x.dtype) @ up.to(x.dtype).t()
            scores = scores_of(scores, transform)
            return scores @ class_weight.to(scores.dtype) / len(class_weight)

    low, up = (None, None) if adapter is None else adapter
    head, up = of_head(weight), of_head(up)
    transform = transform._replace(bias=None if transform.bias is None else transform.bias.to(wide))
    chunks = hidden.reshape(-1, hidden.shape[-1])[rows].split(step)
    lows = [None] * len(chunks) if low is None else low.reshape(-1, low.shape[-1])[rows].split(step)
    pairs = zip(chunks, lows, strict=True)
    means = torch.cat([checkpoint(of_rows, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs])
    return means.new_zeros(counts.numel()).index_copy(0, rows, means).view(counts.shape)
