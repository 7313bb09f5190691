"""Which rows a process has, where several share the work, and which of them are there only to fill up.

accelerate deals out batches of one size. Where the rows of a data set do not divide by all processes, its last batches
are filled up with rows that were there before. Processes of one group of tensor parallelism hold one model together,
and get the same rows.
"""

from __future__ import annotations

from typing import Any


def data_rank(accelerator: Any) -> tuple[int, int]:
    """The place of this process among those that have rows of their own, and their number."""
    config = getattr(accelerator, "parallelism_config", None)
    size = getattr(config, "tp_size", None) or 1
    return accelerator.process_index // size, accelerator.num_processes // size


def rows_that_count(accelerator: Any, rows: int) -> int:
    """How many rows of the batch that the data loader gave last are not repeats; those stand at its end.

    Of a stream nobody knows: all of them.

    Args:
        rows: of that batch.
    """
    state, (index, count) = accelerator.gradient_state, data_rank(accelerator)
    if count == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - rows * index))
