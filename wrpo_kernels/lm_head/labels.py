"""Labels at the positions that predict them."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import check_int, check_labels, is_readable
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.lm_head.inputs import HeadTensors


def with_shifted_labels(
    tensors: HeadTensors, name: str, shift: bool | int, ignore_index: int, cu_seqlens: Tensor | None = None
) -> HeadTensors:
    labels, vocabulary = tensors.target, tensors.weight.shape[0]
    moved = shifted_labels(name, labels, shift, ignore_index, vocabulary, cu_seqlens)
    return tensors if moved is labels else tensors._replace(target=moved)


def shifted_labels(
    name: str,
    labels: Tensor,
    shift: bool | int,
    ignore_index: int,
    vocabulary: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[..., T] with labels[..., t + shift] at t and `ignore_index` where no label is left: the last `shift` positions,
    of packed labels [N] those of each sequence. The hidden states stay where they are."""
    check_int("ignore_index", ignore_index)
    if not isinstance(shift, bool):
        check_int("shift", shift)
        if shift < 0:
            raise ValueError(f"shift must be False, True (1) or an int >= 0, got {shift}")
    if not shift or not labels.dim():
        return labels
    if is_readable(labels):  # here, where a position is still the caller's
        check_labels(name, labels.reshape(-1), ignore_index, vocabulary)
    steps = labels.shape[-1]
    moved = torch.full_like(labels, ignore_index)
    moved[..., : max(steps - shift, 0)] = labels[..., shift:]
    if cu_seqlens is None:
        return moved
    ends = to_device(cu_seqlens, torch.int64, labels.device)[1:]
    position = torch.arange(steps, device=labels.device)
    own = torch.searchsorted(ends, position, right=True).clamp(max=max(len(ends) - 1, 0))
    return moved.where(position + shift < ends[own], ignore_index) if len(ends) else moved
