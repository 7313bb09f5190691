"""What each response of a batch weighs in its row's margin m = sum_s w_s r_s, and sums over the responses of a row.

With q a response's share among those of its role in its row, and alpha of the step,

    w = alpha_b q         source        alpha_b = alpha   if the row has a source and a target
        (1 - alpha_b) q   target                  0       if it has no source: a plain pair
        -q                rejected                1       if it has no target

B rows, S responses, row after row; `num_responses` [B] says how many each row has. Source: WRPO, arXiv:2412.03187,
whose rows are [source, target, rejected] each; the other rows are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo.data.batch import row_of
from wrpo.data.collation import Batch
from wrpo.data.roles import Role


def sum_by_row(values: Tensor, batch: Batch) -> Tensor:
    """[S] -> [B]. The checks of segment_reduce would read the counts back from an accelerator."""
    return torch.segment_reduce(values, "sum", lengths=batch["num_responses"], unsafe=values.device.type != "cpu")


def has_role(batch: Batch, role: int) -> Tensor:
    """[B] bool, whether a row has a response of the role."""
    return sum_by_row((batch["role"] == role).float(), batch) > 0


def response_weights(batch: Batch, alpha: float | Tensor) -> Tensor:
    """[S] float64, the weights above.

    Args:
        batch: with `num_responses` [B], `role` [S], `share` [S].
        alpha: fusion coefficient of the step in [0, 1], a number or [].
    """
    role, share = batch["role"], batch["share"].double()
    source, target = has_role(batch, Role.SOURCE), has_role(batch, Role.TARGET)
    alpha_of_row = (source & target).double() * alpha + (source & ~target)  # [B]
    alpha_of_response = alpha_of_row[row_of(batch)]
    of_target = torch.where(role == Role.TARGET, (1.0 - alpha_of_response) * share, -share)
    return torch.where(role == Role.SOURCE, alpha_of_response * share, of_target)


def shares_by_score(batch: Batch, score: Tensor) -> Tensor:
    """[S] float32: among the sources of a row q_k proportional to share_k exp(score_k); of other roles the share.

    Args:
        score: [S] float64; read for sources alone.
    """
    is_source, row = batch["role"] == Role.SOURCE, row_of(batch)
    logit = torch.where(is_source, batch["share"].double().log() + score, -torch.inf)
    unsafe = score.device.type != "cpu"
    largest = torch.segment_reduce(logit, "max", lengths=batch["num_responses"], unsafe=unsafe)[row]
    power = torch.where(is_source, (logit - largest).exp(), 0.0)
    return torch.where(is_source, power / sum_by_row(power, batch)[row], batch["share"].double()).float()
