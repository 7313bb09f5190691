"""How many rows of logits exist at a time: the byte budget, turned into chunks of rows."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes. 1 GiB is 4096 rows of Llama-3's 128256 logits in bfloat16. An accelerator gets more: each chunk reads and
# writes the float32 gradient of the head once, and with 512 MiB that made a step 1.33 times its products, with 1 GiB
# 1.16 (H200, 2026-11-26, see docs/log.md).
DEFAULT_BUDGET = 512 << 20
DEFAULT_BUDGET_OF_ACCELERATOR = 1 << 30
LARGEST_BUDGET = (1 << 63) - 1  # what the ops' int64 holds


class Plan(NamedTuple):
    """Rows [0, keep) leave their delta in memory until the backward; the others pass through chunks of `chunk` rows."""

    keep: int
    chunk: int


def rows_within(budget_bytes: int, hidden: Tensor, weight: Tensor, up: Tensor | None = None) -> int:
    """Rows whose logits [V] fit, with a gathered hidden state and a copy scaled in float32 [4 D]; at least one.

    The low-rank part of an adapter is handled as the hidden state is: [4 r].
    """
    vocabulary, width = weight.shape
    rank = 0 if up is None else up.shape[1]
    row_bytes = (vocabulary + 4 * (width + rank)) * hidden.dtype.itemsize
    return max(1, budget_bytes // row_bytes)


def plan_rows(num_rows: int, fit: int, keeps_delta: bool) -> Plan:
    """With deltas to keep and too many rows, three quarters of the budget keep and one quarter is worked in."""
    if num_rows <= fit:
        return Plan(num_rows if keeps_delta else 0, num_rows)
    if not keeps_delta:
        return Plan(0, even_chunk(num_rows, fit))
    keep = fit - max(1, fit // 4)
    return Plan(keep, even_chunk(num_rows - keep, fit - keep))


def even_chunk(num_rows: int, most: int) -> int:
    """The smallest chunk that needs no more chunks than `most` would: no thin last one."""
    chunks = -(-num_rows // most)
    return -(-num_rows // chunks)


def default_budget(device: torch.device) -> int:
    """Bytes that the logits which exist at a time may take where `budget_bytes` is None.

    Args:
        device: where the hidden states are.

    Returns:
        512 MiB on the CPU, 1 GiB on an accelerator.
    """
    return DEFAULT_BUDGET if device.type == "cpu" else DEFAULT_BUDGET_OF_ACCELERATOR


def check_budget(budget_bytes: int | None, device: torch.device) -> int:
    if budget_bytes is None:
        return default_budget(device)
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, (int, numbers.Integral)):
        raise TypeError(f"budget_bytes must be an int, got {type(budget_bytes).__name__}")
    budget_bytes = int(budget_bytes)
    if budget_bytes <= 0:
        raise ValueError(f"budget_bytes must be > 0, got {budget_bytes}")
    return min(budget_bytes, LARGEST_BUDGET)
