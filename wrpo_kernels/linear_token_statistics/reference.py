"""The statistics of rows of logits and their gradient in plain torch: the specification, and the last resort anywhere.

With p = softmax(z), H the entropy, y the label and lsq = log sum_v p_v^2

    d logp / dz_v = 1[v = y] - p_v          d lse / dz_v = p_v          d mean / dz_v = 1 / V
    d H / dz_v = -p_v (log p_v + H)         d lsq / dz_v = 2 p_v (p_v / sum_u p_u^2 - 1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import reference as row_kernel
from wrpo_kernels.token_logp.reference import scores_of

NAME = "reference"
BLOCK_BYTES = {"cpu": 4 << 20}  # of float32 scores at a time, so that the temporaries stay small
BLOCK_BYTES_OF_ACCELERATOR = 64 << 20


def refuses(logits: Tensor) -> str | None:
    return None


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
    logp, lse = values.new_empty(len(logits)), values.new_empty(2, len(logits))
    row_kernel.forward(logits, target, ignore_index, transform, logp, lse)
    write_logp(logp, lse, values, top1)
    if any(wanted):
        for rows in _row_blocks(logits):
            scores, counts = scores_of(logits[rows], transform), target[rows] != ignore_index
            _write_rows(scores, lse[:, rows], counts, wanted, values[rows], top1[rows])


def write_logp(logp: Tensor, lse: Tensor, values: Tensor, top1: Tensor) -> None:
    """What `token_logp` has written as columns of `values`, and nothing beside it."""
    values.zero_()
    top1.fill_(-1)
    for name, column in (("logp", logp), ("lse", lse[0]), ("lse_rest", lse[1])):
        values[:, COLUMNS.index(name)] = column


def _write_rows(scores: Tensor, lse: Tensor, counts: Tensor, wanted: Wanted, values: Tensor, top1: Tensor) -> None:
    log_share = (scores - lse[0, :, None]) - lse[1, :, None]
    share = log_share.exp()
    found = {}
    if wanted.entropy:
        found["entropy"] = -(share * log_share).where(share != 0, 0.0).sum(1)
    if wanted.mean_logits:
        found["mean_logits"] = (scores / scores.shape[1]).sum(1)  # two that a mask made the lowest number have no sum
    if wanted.log_sum_sq_probs:
        found["log_sum_sq_probs"] = share.square().sum(1).log()
    for name, column in found.items():
        values[:, COLUMNS.index(name)] = column.where(counts, 0.0)
    if wanted.top1:
        top1.copy_(scores.argmax(1).where(counts, -1))


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
    for rows in _row_blocks(logits):
        logits[rows] = _grad_rows(logits[rows], target[rows], ignore_index, transform, values[rows], coef[rows])


def _grad_rows(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, values: Tensor, coef: Tensor
) -> Tensor:
    logp, lse, entropy, _, log_sum_sq, rest = values[:, :, None].unbind(1)
    of_logp, of_lse, of_entropy, of_mean, of_sum_sq, _ = coef[:, :, None].unbind(1)
    scores = scores_of(logits, transform)
    log_share = (scores - lse) - rest
    share = log_share.exp()
    inner = of_lse - of_entropy * (log_share + entropy) + 2 * of_sum_sq * (share * torch.exp(-log_sum_sq) - 1)
    counts = (target != ignore_index)[:, None]
    label = target[:, None].where(counts, 0)
    softmax_part = -of_logp * share
    softmax_part.scatter_(1, label, -of_logp * torch.expm1(logp))  # 1 - p of the label, exact where p is nearly 1
    grad = (share * inner).where(share != 0, 0.0) + softmax_part + of_mean / logits.shape[1]
    grad = grad * transform.slope
    if transform.softcap:
        grad = grad * (1 - (scores * transform.temperature / transform.softcap) ** 2)
    return grad.where(counts, 0.0)


def _row_blocks(logits: Tensor) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES_OF_ACCELERATOR) // (4 * vocabulary))
    return [slice(first, first + step) for first in range(0, rows, step)]
