"""The one pass where nothing is left to decide: a bare head on a CPU, whose rows go at once.

    logits = h W^T -> log-probs and delta -> values and one coefficient c a row -> dh = c (delta W), dW = delta^T (c h)

The same calls of the same kernels as in `one_pass`, without the objects that hold a head and its gradients for any
number of chunks: a toy takes 0.04 to 0.07 of plain torch's time less (AMX machine, 2026-11-30, see docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.linear_token_logp.contract import rows_of
from wrpo_kernels.lm_head import products
from wrpo_kernels.lm_head.inputs import HeadGradients, HeadOptions, HeadTensors
from wrpo_kernels.preference_loss import native as native_loss
from wrpo_kernels.preference_loss.family import LossArguments
from wrpo_kernels.token_logp import native as native_rows


def takes(tensors: HeadTensors, options: HeadOptions) -> bool:
    """Whether a weight in the type of the hidden states makes the logits alone, and the native kernels can do it."""
    hidden, weight, _, bias, low, _ = tensors
    if not (bias is low is None and weight.dtype == hidden.dtype and options.num_rows > 0):
        return False
    if options.grad_filter or options.has_float32_logits or options.backend not in (None, native_rows.NAME):
        return False
    return native_rows.refuses(hidden) is None


def run(
    tensors: HeadTensors, options: HeadOptions, loss: LossArguments, divisor: int
) -> tuple[tuple[Tensor, ...], HeadGradients]:
    """total [], loss [G], logp [S], reward [S] and margin [G]; and the gradients of the total."""
    weight, rows = tensors.weight, rows_of(tensors, options)
    number = len(rows)
    hidden = rows.hidden(0, number)
    delta = products.logits_into(hidden.new_empty(number, weight.shape[0]), hidden, weight)
    token_logp = hidden.new_empty(number, dtype=torch.float32)
    lse = token_logp.new_empty(2, number)
    native_rows.delta_(delta, rows.target, options.ignore_index, options.transform(None), token_logp, lse)
    *values, coef = native_loss.of_rows(token_logp, loss, divisor)
    dh = dw = None
    if options.asked.hidden:
        share = products.grad_hidden_into(hidden.new_empty(hidden.shape), delta, weight)
        dh = rows.spread(products.scale_rows_(share, coef)).view(tensors.hidden.shape)
    if options.asked.weight:
        dw = weight.new_empty(weight.shape)
        products.grad_weight_into(dw, delta, products.scaled_rows(hidden, coef))
    return tuple(values), HeadGradients(dh, dw, None, None, None)
