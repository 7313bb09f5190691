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


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def num_counted(batch: Batch) -> int | None:
    """How many labels count, where that is known without waiting for the device."""
    if (lengths := lengths_on_host(batch)) is not None:
        return sum(lengths)
    return len(batch["labels"]) if "cu_seqlens" in batch else None


def lengths_on_host(batch: Batch) -> list[int] | None:
    """[S], the tokens of each response that count, as the collator knows them; None of a batch made elsewhere."""
    return [length for row in batch["lengths"] for length in row] if "lengths" in batch else None


def group_of(batch: Batch) -> Tensor:
    """[S] int64, the row of each response; on the CPU where the collator has told."""
    if "lengths" in batch:
        return torch.tensor([row for row, lengths in enumerate(batch["lengths"]) for _ in lengths])
    return row_of(batch)


def row_of(batch: Batch) -> Tensor:
    """[S] int64, the row of each response, on the device of the batch; nothing waits for it."""
    count = batch["num_responses"]
    return torch.arange(len(count), device=count.device).repeat_interleave(count, output_size=len(batch["role"]))


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


def tail_weight(batch: Batch, share: float) -> Tensor:
    """Of each label, [S, T] or [N] float32: 1 up to the length of the row's shortest response, `share` beyond it.

    Source: LD-DPO, arXiv:2409.06411, of pairs.
    """
    count, length = batch["num_responses"], response_lengths(batch)
    unsafe = length.device.type != "cpu"
    shortest = torch.segment_reduce(length.double(), "min", lengths=count, unsafe=unsafe)  # [rows]
    shared = shortest.repeat_interleave(count, output_size=len(length))  # [S]
    if "cu_seqlens" in batch:
        number = len(batch["labels"])
        of_label = torch.arange(len(length), device=length.device).repeat_interleave(length, output_size=number)
        is_tail = torch.arange(number, device=length.device) - batch["cu_seqlens"][of_label] >= shared[of_label]
    else:
        is_tail = (batch["labels"] != IGNORE).cumsum(1) > shared[:, None]
    return torch.where(is_tail, share, 1.0)
