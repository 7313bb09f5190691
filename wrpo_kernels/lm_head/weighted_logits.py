"""Means of logits in which each token has a weight of its own, where a softcap or an adapter forbids to weigh the
rows of the head instead."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wrpo_kernels.lm_head.budget import check_budget
from wrpo_kernels.lm_head.head import no_autocast
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.reference import scores_of

FLOAT32_ROWS = 4  # of the scores, their transform and the gradients of both, in the backward of a chunk


def weighted_mean_logits(
    hidden: Tensor,
    weight: Tensor,
    adapter: tuple[Tensor, Tensor] | None,
    transform: LogitTransform,
    class_weight: Tensor,
    counts: Tensor,
    budget_bytes: int | None,
) -> Tensor:
    """[...] 1/V sum_v class_weight[v] z[n, v] where `counts` [...], else 0; differentiable in all but the weights.

    A chunk of rows within the budget at a time, whose logits the backward makes again: 2NDV flops forward alone, 8NDV
    with the gradients of both operands.
    """
    rows = counts.reshape(-1).nonzero()[:, 0]
    step = max(1, check_budget(budget_bytes, hidden.device) // (FLOAT32_ROWS * 4 * len(weight)))

    def of_rows(some: Tensor) -> Tensor:
        with no_autocast(hidden):
            x = hidden.reshape(-1, hidden.shape[-1])[some]
            scores = x @ weight.to(x.dtype).t()
            if adapter is not None:
                low, up = adapter
                scores = scores + low.reshape(-1, low.shape[-1])[some].to(x.dtype) @ up.to(x.dtype).t()
            scores = scores_of(scores, transform)
            return scores @ class_weight.to(scores.dtype) / len(class_weight)

    found = [checkpoint(of_rows, some, use_reentrant=False, preserve_rng_state=False) for some in rows.split(step)]
    means = torch.cat(found)
    return means.new_zeros(counts.numel()).index_copy(0, rows, means).view(counts.shape)
