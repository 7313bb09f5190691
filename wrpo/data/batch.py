"""Reading a batch of either form: labels [S, T] of padded rows, or [N] with the bounds `cu_seqlens` [S+1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .collation import IGNORE, Batch

OF_SFT = ("input_ids", "labels")
OF_PREFERENCES = (*OF_SFT, "num_responses", "role", "share")


def check_batch(batch: Any, needed: tuple[str, ...]) -> Any:
    """The batch, which a collator of somebody's own may have made.

    Raises:
        TypeError: no dict.  ValueError: one without a tensor that is needed.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"data_collator: expected a dict of tensors with {', '.join(needed)}, got {type(batch).__name__}"
        )
    if lacking := [name for name in needed if not isinstance(batch.get(name), Tensor)]:
        raise ValueError(
            f"data_collator: expected tensors {', '.join(needed)}, got none of {', '.join(lacking)} beside "
            f"{', '.join(map(str, batch))}. Begin with the batch of PreferenceCollator or SFTCollator"
        )
    return batch


def num_counted(batch: Batch) -> int | None:
    """How many labels count, where that is known without waiting for the device."""
    return len(batch["labels"]) if "cu_seqlens" in batch else None


def response_lengths(batch: Batch) -> Tensor:
    """[S] int64, the tokens of each response that count."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].diff()
    return (batch["labels"] != IGNORE).sum(1)


def sum_by_response(values: Tensor, batch: Batch) -> Tensor:
    """Of a value for each label, [S, T] or [N], the sums over each response, [S] float64; differentiable."""
    if "cu_seqlens" not in batch:
        return values.sum(1, dtype=torch.float64)
    # On an accelerator the checks of segment_reduce would read the bounds back.
    unsafe = values.device.type != "cpu"
    return torch.segment_reduce(values.double(), "sum", offsets=batch["cu_seqlens"], initial=0.0, unsafe=unsafe)
