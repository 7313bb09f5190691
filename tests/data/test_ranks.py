"""Every row counts once, however many processes see it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from wrpo.data.ranks import data_rank, rows_that_count


def accelerator(index: int, count: int, *, tensor_parallel: int = 1, remainder: int = 0, at_end: bool = True):
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        parallelism_config=SimpleNamespace(tp_size=tensor_parallel) if tensor_parallel > 1 else None,
        gradient_state=SimpleNamespace(end_of_dataloader=at_end, remainder=remainder),
    )


def test_processes_that_hold_one_model_together_are_one_rank_of_the_data():
    ranks = [data_rank(accelerator(index, 6, tensor_parallel=2)) for index in range(6)]
    assert ranks == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]


@pytest.mark.parametrize("tensor_parallel", [1, 2, 3])
@pytest.mark.parametrize("remainder", range(1, 9))
def test_the_last_batches_of_all_ranks_hold_each_row_of_the_data_once(remainder, tensor_parallel):
    """Three rows a batch on three ranks, dealt out in order and filled up with repeats."""
    for place in range(tensor_parallel):
        members = [index * tensor_parallel + place for index in range(3)]
        options = {"tensor_parallel": tensor_parallel, "remainder": remainder}
        counted = [rows_that_count(accelerator(m, 3 * tensor_parallel, **options), 3) for m in members]
        assert sum(counted) == remainder
        assert counted == sorted(counted, reverse=True)


@pytest.mark.parametrize("state", [{"at_end": False, "remainder": 1}, {"remainder": 0}, {"remainder": -1}])
def test_before_the_end_and_where_the_rows_divide_or_are_a_stream_all_rows_count(state):
    assert rows_that_count(accelerator(1, 2, **state), 4) == 4
