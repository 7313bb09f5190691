"""How much a row counts that is likely under the policy, as its own samples are.

    w_b = exp(sum_s |w_s| mean_t (log p(y_t) - log sum_v p(v)^2))         s: the responses of row b, w_s their weights

Of an answer that the policy samples the mean is about 0. No sum over the vocabulary is needed: of p' at half the
temperature, log p'(y) = 2 z_y - logsumexp 2z, so that log p(y) - log sum_v p(v)^2 = log p'(y) - log p(y).

Source: WPO, arXiv:2406.11827, of pairs, with its alignment to sampled answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo.data.batch import num_counted, response_lengths, sum_by_response
from wrpo.data.collation import Batch
from wrpo_kernels import linear_token_logp

from .response_weights import sum_by_row


@torch.no_grad()
def on_policy_weight(hidden: Tensor, weight: Tensor, batch: Batch, response_weight: Tensor, **head: Any) -> Tensor:
    """[B] float32: two products of the head without a gradient.

    Args:
        hidden, weight, **head: what the head receives, as `linear_token_logp` takes it.
        batch: in any layout.
        response_weight: [S], of `response_weights`.
    """
    options = {**head, "num_rows": num_counted(batch)}
    sharper, plain = (linear_token_logp(hidden, weight, batch["labels"], temperature=t, **options) for t in (0.5, 1.0))
    mean = sum_by_response(sharper - plain, batch) / response_lengths(batch).clamp(min=1)  # [S]
    return sum_by_row(response_weight.abs() * mean, batch).exp().float()
