"""The one pass where nothing is left to decide: a bare head on a CPU, whose rows go at once.

    logits = h W^T -> log-probs -> values and one coefficient c a row -> c delta -> dh = (c delta) W, dW = (c delta)^T h

The same kernels as in `one_pass`, in one call, without the objects that hold a head and its gradients for any number of
chunks. Here c is known before delta is written, so that no rows of h and dh are scaled.
"""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.lm_head import products
from wrpo_kernels.lm_head.budget import logits_buffer
from wrpo_kernels.lm_head.inputs import HeadGradients, HeadOptions, HeadTensors
from wrpo_kernels.lm_head.rows import Rows
from wrpo_kernels.preference_loss.family import LossArguments
from wrpo_kernels.preference_loss.native import of_logits_
from wrpo_kernels.token_logp import native


def takes(tensors: HeadTensors, options: HeadOptions) -> bool:
    """Whether a weight in the type of the hidden states makes the logits alone, and the native kernels can do it."""
    hidden, weight, _, bias, low, _ = tensors
    if not (bias is low is None and weight.dtype == hidden.dtype):
        return False
    if options.grad_filter or options.has_float32_logits or options.backend not in (None, native.NAME):
        return False
    return native.refuses(hidden) is None


def run(
    tensors: HeadTensors, rows: Rows, options: HeadOptions, loss: LossArguments, divisor: int
) -> tuple[tuple[Tensor, ...], HeadGradients]:
    """total [], logp [S], reward [S] and margin [G] of one row or more; and the gradients of the total."""
    weight, number = tensors.weight, len(rows)
    hidden = rows.hidden(0, number)
    gradient = products.logits_into(logits_buffer(weight, number, weight.shape[0]), hidden, weight)
    transform = options.transform(None)
    *values, _ = of_logits_(gradient, rows.target, options.ignore_index, transform, loss, divisor)
    dh = dw = None
    if options.asked.hidden:
        share = products.grad_hidden_into(in_huge_pages(hidden.new_empty(hidden.shape)), gradient, weight)
        dh = rows.spread(share).view(tensors.hidden.shape)
    if options.asked.weight:
        dw = in_huge_pages(weight.new_empty(weight.shape))
        products.grad_weight_into(dw, gradient, hidden)
    return tuple(values), HeadGradients(dh, dw, None, None, None)
