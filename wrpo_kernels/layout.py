"""Batches that stand role by role: the first role's response of every example, then the second role's, and so on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_tensor

HOST = torch.device("cpu")


def role_by_role(weights: Tensor, examples: int, group_on: torch.device) -> dict[str, Any]:
    """`seq_weight` [R B], `group` [R B] and `num_groups` of B examples, whose R roles weigh `weights` [R] or [R, B].

    group_on: the device of `group`: that of the log-probs, or the CPU, where a linear loss reads it without waiting.
    """
    roles = len(weights)
    return {
        "seq_weight": weights.reshape(roles, -1).expand(roles, examples).reshape(-1),
        "group": torch.arange(examples, device=group_on).expand(roles, examples).reshape(-1),
        "num_groups": examples,
    }


def count_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """S of labels [S, T], or of packed labels with bounds [S+1]."""
    if cu_seqlens is None:
        check_tensor("labels", labels)
        if labels.dim() != 2:
            raise ValueError(f"labels must be [S, T], or packed [N] with cu_seqlens, got {list(labels.shape)}")
        return labels.shape[0]
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [S+1], got {list(cu_seqlens.shape)}")
    return cu_seqlens.shape[0] - 1
