"""What Liger's losses of whole sequences share: the log-probs of the reference, and the mean logits that they log."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import is_readable
from wrpo_kernels.integrations.operands import checked_operands
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.lm_head.head import no_autocast

NAMES = ("_input", "lin_weight", "target", "bias")
REFERENCE_NAMES = ("ref_input", "ref_weight", "target", "ref_bias")


def sequence_operands(
    _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """`_input` [S, T, D] as a linear layer takes it, and `target` [S, T] in int64, with labels that count in each."""
    hidden, labels = checked_operands(NAMES, _input, lin_weight, target, bias, ignore_index)
    if labels.dim() != 2:
        raise ValueError(f"target must be [S, T], got {list(labels.shape)}")
    if is_readable(labels):
        is_empty = (labels == ignore_index).all(1)
        if is_empty.any():
            raise ValueError(
                f"target[{int(is_empty.nonzero()[0])}] has no label that counts, so its log-prob means nothing; leave "
                "the sequence out of the batch, and its partner"
            )
    return hidden, labels


@torch.no_grad()
def reference_logp(
    ref_input: Tensor | None, ref_weight: Tensor | None, target: Tensor, ref_bias: Tensor | None, ignore_index: int
) -> Tensor:
    """[S] float32, the summed log-prob of each sequence under the reference."""
    if ref_input is None or ref_weight is None:
        raise ValueError("ref_input and ref_weight must be given with use_ref_model=True")
    hidden, labels = checked_operands(REFERENCE_NAMES, ref_input, ref_weight, target, ref_bias, ignore_index)
    return linear_token_logp(hidden, ref_weight, labels, bias=ref_bias, ignore_index=ignore_index).sum(1)


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[S] float32, the mean logit of each sequence over all positions and tokens: by linearity the product of means."""
    with no_autocast(hidden):
        direction = weight.mean(0, dtype=torch.float32)
        offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
        return hidden.mean(1, dtype=torch.float32) @ direction + offset
