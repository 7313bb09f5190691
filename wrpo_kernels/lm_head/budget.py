"""How many rows of logits exist at a time: the byte budget, turned into chunks of rows."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.dispatch.huge_pages import in_huge_pages

# Bytes. An accelerator gets more than a CPU: each chunk reads and writes the float32 gradient of the head once, and
# with 512 MiB that made a step 1.33 times its products, with 1 GiB 1.16 (H200, 2026-11-26, see docs/log.md). With the
# share below the heads of the suite are one chunk there, and a card of 24 GB gives logits 0.75 GiB.
DEFAULT_BUDGET = 512 << 20
MOST_OF_ACCELERATOR = 4 << 30
SHARE_OF_ACCELERATOR = 32  # one part in so many of its memory
LARGEST_BUDGET = (1 << 63) - 1  # what the ops' int64 holds
ROW_TILE = 128  # of the products of an accelerator
ALIGNED = 64  # elements: 128 bytes of 16-bit logits
# A CPU's malloc keeps blocks of up to 32 MiB for the next call and takes larger ones from the kernel, each time anew,
# which has to clear them, in huge pages too: forward alone, V = 8192, D = 256, took 1.5 (float32) and 1.3 (bfloat16)
# times as long with 512 MiB as with 32. But a product of few rows reads the weight for little: the 170 (341) of V =
# 49152 that 32 MiB hold took 1.2 (1.3) times as long as 512, and those 0.9 (1.0) times as long as 1024 at once (AMX
# machine, CPU time of one thread, 2026-11-30, see docs/log.md).
KEPT_BY_MALLOC = 32 << 20
FEWEST_ROWS = 512


class Plan(NamedTuple):
    """Rows [0, keep) leave their delta in memory until the backward; the others pass through chunks of `chunk` rows."""

    keep: int
    chunk: int


def rows_within(
    budget_bytes: int, hidden: Tensor, weight: Tensor, up: Tensor | None = None, logit_bytes: int | None = None
) -> int:
    """Rows whose logits [V] fit, with a gathered hidden state and a copy scaled in float32 [4 D]; at least one.

    The low-rank part of an adapter is handled as the hidden state is: [4 r].
    logit_bytes: of a logit, and of its delta where that does not take its place. Default: those of `hidden`.
    """
    return max(1, budget_bytes // _row_bytes(hidden, weight, up, logit_bytes))


def rows_in_passing(
    budget_bytes: int, hidden: Tensor, weight: Tensor, up: Tensor | None = None, logit_bytes: int | None = None
) -> int:
    """Rows of a chunk of whose logits nothing is kept: as many as fit, on a CPU no more than pay."""
    fit = rows_within(budget_bytes, hidden, weight, up, logit_bytes)
    if hidden.device.type != "cpu":
        return fit
    row_bytes = weight.shape[0] * (logit_bytes or hidden.dtype.itemsize)
    return min(fit, max(FEWEST_ROWS, KEPT_BY_MALLOC // row_bytes))


def rows_before_pieces(
    budget_bytes: int,
    hidden: Tensor,
    weight: Tensor,
    up: Tensor | None,
    trains_weight: bool,
    logit_bytes: int | None = None,
) -> int:
    """Rows that loss and gradients take in one chunk where they could also go in several that leave nothing.

    On a CPU no more than pay; of a trained 16-bit head, for which several chunks want a float32 dW, also as many as
    cost less than that: N a V <= 8VD bytes, with `a` those of a logit, for the dW takes 4VD of new memory and the
    adding about as long again.
    """
    if hidden.device.type != "cpu":
        return rows_at_once(budget_bytes, hidden, weight, up, trains_weight, logit_bytes)
    passing = rows_in_passing(budget_bytes, hidden, weight, up, logit_bytes)
    if not trains_weight or _has_wide_total(hidden, weight):
        return passing
    worth = 8 * weight.shape[1] // (logit_bytes or hidden.dtype.itemsize)
    return max(passing, min(worth, rows_within(budget_bytes, hidden, weight, up, logit_bytes)))


def rows_at_once(
    budget_bytes: int,
    hidden: Tensor,
    weight: Tensor,
    up: Tensor | None,
    trains_weight: bool,
    logit_bytes: int | None = None,
) -> int:
    """Rows that go through in one chunk: those within the budget, and more where that takes no more memory than two.

    Of a trained 16-bit head one chunk of N rows takes their logits and a dW in 16 bits, several take the budget and a
    dW in float32: N a + 2VD <= budget + 4VD bytes, with `a` those of a row. On a CPU a dW is added to in the time of a
    few rows, and the budget stands.
    """
    fit = rows_within(budget_bytes, hidden, weight, up, logit_bytes)
    if not trains_weight or _has_wide_total(hidden, weight) or hidden.device.type == "cpu":
        return fit
    return max(fit, (budget_bytes + 2 * weight.numel()) // _row_bytes(hidden, weight, up, logit_bytes))


def _has_wide_total(hidden: Tensor, weight: Tensor) -> bool:
    """Whether even the dW of one chunk has more than 16 bits."""
    return hidden.dtype.itemsize > 2 or weight.dtype.itemsize > 2


def _row_bytes(hidden: Tensor, weight: Tensor, up: Tensor | None, logit_bytes: int | None) -> int:
    vocabulary, width = weight.shape
    rank, itemsize = 0 if up is None else up.shape[1], hidden.dtype.itemsize
    return vocabulary * (logit_bytes or itemsize) + 4 * (width + rank) * itemsize


def plan_rows(
    num_rows: int, fit: int, at_once: int, keeps_delta: bool, tile: int, deltas_fit: int | None = None
) -> Plan:
    """With deltas to keep and too many rows, three quarters of the budget keep and one quarter is worked in.

    deltas_fit: rows whose deltas alone fill the budget. Default: `fit`, for they take the place of the logits; others
        are made a chunk at a time too.
    """
    if num_rows <= at_once:
        return Plan(num_rows if keeps_delta else 0, num_rows)
    if not keeps_delta:
        return Plan(0, even_chunk(num_rows, fit, tile))
    work = max(1, fit // 4)
    keep = min(num_rows, (deltas_fit or fit) * (fit - work) // fit)
    return Plan(keep, even_chunk(num_rows if deltas_fit else num_rows - keep, work, tile))


def even_chunk(num_rows: int, most: int, tile: int) -> int:
    """Rows of a chunk: no more chunks than `most` rows would need, no thin last one, and whole tiles where they fit."""
    chunks = -(-num_rows // most)
    even = -(-num_rows // chunks)
    whole = -(-even // tile) * tile
    return whole if whole <= most else even


def row_tile(device: torch.device) -> int:
    """Rows that a matrix product takes at a time."""
    return 1 if device.type == "cpu" else ROW_TILE


def logits_buffer(like: Tensor, num_rows: int, vocabulary: int, dtype: torch.dtype | None = None) -> Tensor:
    """[num_rows, V] in the type of `like` unless said; on an accelerator each row starts at a multiple of 128 bytes.

    Products of 16-bit matrices whose rows are not aligned run on slow kernels, and V = 50257, or a vocabulary with
    tokens added, is odd.
    """
    stride = row_stride(like.device, vocabulary)
    buffer = in_huge_pages(like.new_empty(num_rows, stride, dtype=dtype))
    return buffer if stride == vocabulary else buffer[:, :vocabulary]


def row_stride(device: torch.device, vocabulary: int) -> int:
    """Elements from one row of logits to the next."""
    return vocabulary if device.type == "cpu" else -(-vocabulary // ALIGNED) * ALIGNED


def default_budget(device: torch.device) -> int:
    """Bytes that the logits which exist at a time may take where `budget_bytes` is None.

    Args:
        device: where the hidden states are.

    Returns:
        512 MiB on the CPU; on an accelerator a 32nd of its memory, at most 4 GiB.
    """
    if device.type == "cpu":
        return DEFAULT_BUDGET
    return min(MOST_OF_ACCELERATOR, memory_of(device) // SHARE_OF_ACCELERATOR)


def memory_of(device: torch.device) -> int:
    """Bytes of the device; as of the largest where it is not there (meta tensors, a compiler's stand-ins)."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return MOST_OF_ACCELERATOR * SHARE_OF_ACCELERATOR


def check_budget(budget_bytes: int | None, device: torch.device) -> int:
    if budget_bytes is None:
        return default_budget(device)
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, (int, numbers.Integral)):
        raise TypeError(f"budget_bytes must be an int, got {type(budget_bytes).__name__}")
    budget_bytes = int(budget_bytes)
    if budget_bytes <= 0:
        raise ValueError(f"budget_bytes must be > 0, got {budget_bytes}")
    return min(budget_bytes, LARGEST_BUDGET)
