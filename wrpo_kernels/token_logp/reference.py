"""`token_logp` in plain torch: the specification, and the last resort on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import check_labels
from wrpo_kernels.logit_transform import LogitTransform

NAME = "reference"
BLOCK_BYTES = 4 << 20  # rows are taken in blocks of this size so that the float32 temporaries stay small


def refuses(logits: Tensor) -> str | None:
    return None


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """Writes `logp` [N] and `lse` [2, N], whose sum is the log-sum-exp: one number has no digits for large scores."""
    check_labels("target", target, ignore_index, logits.shape[1])
    for rows in _row_blocks(logits):
        _forward_rows(logits[rows], target[rows], ignore_index, transform, logp[rows], lse[:, rows])


def delta_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """`forward`, and leaves `delta[n, v] = d logp[n] / d logits[n, v]` in place of the logits."""
    check_labels("target", target, ignore_index, logits.shape[1])
    for rows in _row_blocks(logits):
        scores = _forward_rows(logits[rows], target[rows], ignore_index, transform, logp[rows], lse[:, rows])
        logits[rows] = _delta_rows(scores, target[rows], ignore_index, transform, logp[rows], lse[:, rows])


def grad(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    logp: Tensor,
    lse: Tensor,
    grad_logp: Tensor,
    grad_logits: Tensor,
) -> None:
    """Writes `grad_logits[n, v] = grad_logp[n] * delta[n, v]`."""
    for rows in _row_blocks(logits):
        scores = scores_of(logits[rows], transform)
        delta = _delta_rows(scores, target[rows], ignore_index, transform, logp[rows], lse[:, rows])
        counts = target[rows, None] != ignore_index  # an ignored row has gradient 0 whatever comes from above
        grad_logits[rows] = (delta * grad_logp[rows, None]).where(counts, 0.0).to(grad_logits.dtype)


def _row_blocks(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, BLOCK_BYTES // (4 * vocabulary))
    return [slice(first, first + step) for first in range(0, rows, step)]


def scores_of(logits: Tensor, transform: LogitTransform) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if transform.bias is not None:
        z = z + transform.bias.to(z.dtype)
    z = z * transform.logit_scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def _forward_rows(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> Tensor:
    """Returns the scores. The label is left out of the sum: where it is nearly certain it would hide the others."""
    scores = scores_of(logits, transform)
    counts = target != ignore_index
    label = target.where(counts, 0)[:, None]
    top = scores.amax(1, keepdim=True)
    terms = torch.exp(scores - top)
    mine = terms.gather(1, label)
    rest = terms.scatter_(1, label, 0.0).sum(1, keepdim=True)
    relative, log_sum = scores.gather(1, label) - top, torch.log(mine + rest)
    value = torch.where(mine > rest, -torch.log1p(rest / mine), relative - log_sum)
    logp.copy_(value[:, 0].where(counts, 0.0))
    total = top + log_sum
    lse.copy_(torch.stack([total[:, 0], ((top - total) + log_sum)[:, 0]]).where(counts, 0.0))
    return scores


def _delta_rows(
    scores: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> Tensor:
    counts = (target != ignore_index)[:, None]
    delta = -torch.exp((scores - lse[0, :, None]) - lse[1, :, None])
    # 1 - p of the label, exact where p is nearly 1
    delta.scatter_(1, target[:, None].where(counts, 0), -torch.expm1(logp)[:, None])
    delta = delta * transform.slope
    if transform.softcap:
        delta = delta * (1 - (scores * transform.temperature / transform.softcap) ** 2)
    return delta.where(counts, 0.0)
