"""How a budget of bytes becomes chunks of rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from wrpo_kernels.environment import default_budget
from wrpo_kernels.lm_head.budget import (
    even_chunk,
    logits_buffer,
    plan_rows,
    row_tile,
    rows_at_once,
    rows_before_pieces,
    rows_in_passing,
    rows_within,
)

GiB, CPU, META = 1 << 30, torch.device("cpu"), torch.device("meta")
HEADS = {"SmolLM2": (49152, 576), "Qwen3": (151936, 1024), "Gemma": (262144, 1152), "Llama": (128256, 4096)}


def head(vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, width, dtype=dtype, device="meta"), torch.empty(vocabulary, width, dtype=dtype, device="meta")


@pytest.mark.parametrize(("memory", "budget"), [(141 * GiB, 4 * GiB), (80 * GiB, 2.5 * GiB), (24 * GiB, 0.75 * GiB)])
def test_an_accelerator_gives_logits_a_32nd_of_its_memory_up_to_4_gib(memory, budget, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert default_budget(torch.device("cuda")) == budget
    assert default_budget(CPU) == 512 << 20


@pytest.mark.parametrize(("name", "rows"), [("SmolLM2", 16384), ("Qwen3", 8192), ("Gemma", 4096), ("Llama", 8192)])
def test_the_heads_of_the_suite_are_one_chunk_on_a_large_card(name, rows):
    assert rows_at_once(default_budget(META), *head(*HEADS[name]), None, trains_weight=True) >= rows


@pytest.mark.parametrize("budget", [64 << 20, 512 << 20, 1 << 30])
@pytest.mark.parametrize("name", HEADS)
def test_one_chunk_takes_no_more_memory_than_two(name, budget):
    vocabulary, width = HEADS[name]
    hidden, weight = head(vocabulary, width)
    row = 2 * (vocabulary + 4 * width)
    rows = rows_at_once(budget, hidden, weight, None, trains_weight=True)
    in_chunks = budget + 4 * vocabulary * width
    assert rows * row + 2 * vocabulary * width <= in_chunks < (rows + 1) * row + 2 * vocabulary * width
    assert rows_at_once(budget, hidden, weight, None, trains_weight=False) == rows_within(budget, hidden, weight)
    on_cpu = torch.empty(1, width).bfloat16(), torch.empty(vocabulary, 1).bfloat16().expand(-1, width)
    assert rows_at_once(budget, *on_cpu, None, trains_weight=True) == rows_within(budget, *on_cpu)
    wide = head(vocabulary, width, torch.float32)
    assert rows_at_once(budget, *wide, None, trains_weight=True) == rows_within(budget, *wide)


@pytest.mark.parametrize(("vocabulary", "kind", "rows"), [(8192, torch.float32, 1024), (8192, torch.bfloat16, 2048)])
def test_on_a_cpu_logits_that_pass_take_what_malloc_keeps(vocabulary, kind, rows):
    hidden, weight = torch.empty(1, 64, dtype=kind), torch.empty(vocabulary, 1, dtype=kind).expand(-1, 64)
    assert rows_in_passing(512 << 20, hidden, weight) == rows
    assert rows_in_passing(16 << 20, hidden, weight) == rows_within(16 << 20, hidden, weight) < rows
    large = torch.empty(1, 1, dtype=kind).expand(262144, 64)
    assert rows_in_passing(4 << 30, hidden, large) == 512
    wide = torch.empty(1, 1, dtype=kind).expand(262144, 2048)
    trained = rows_before_pieces(4 << 30, wide[:1], wide, None, trains_weight=True)
    assert trained == (rows_within(4 << 30, wide[:1], wide) if kind == torch.bfloat16 else 512)
    kept_wide = rows_before_pieces(4 << 30, wide[:1], wide[:, :1].float().expand(-1, 2048), None, trains_weight=True)
    assert kept_wide == 512  # its dW is float32 whatever the chunks
    on_accelerator = head(vocabulary, 64)
    assert rows_in_passing(512 << 20, *on_accelerator) == rows_within(512 << 20, *on_accelerator)


def test_pieces_are_whole_tiles_where_they_fit():
    tile = row_tile(META)
    assert even_chunk(16384, 10433, tile) == 8192
    assert even_chunk(8192, 3440, tile) == 2816  # 2731 rounded up: as many pieces, none of them longer than may be
    assert even_chunk(700, 400, tile) == 384
    assert even_chunk(550, 300, tile) == 275  # 384 would not fit
    assert even_chunk(130, 129, row_tile(CPU)) == 65
    assert plan_rows(100, 10, 200, True, tile) == (100, 100)
    assert plan_rows(1000, 400, 400, False, tile) == (0, 384)


@pytest.mark.parametrize("budget", [1 << 20, 64 << 20, 1 << 30])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [100, 2000, 50000])
def test_float32_logits_and_the_deltas_beside_them_share_the_budget(rows, name, budget):
    """A row that is worked on takes 4 bytes a logit and 2 a delta, one that is kept its delta alone."""
    hidden, weight = head(*HEADS[name])
    fit, deltas_fit = rows_within(budget, hidden, weight, None, 6), rows_within(budget, hidden, weight)
    plan = plan_rows(rows, fit, fit, True, row_tile(META), deltas_fit)
    vocabulary, width = HEADS[name]
    deltas = 2 * vocabulary + 8 * width  # and the hidden states
    taken = deltas * plan.keep + (deltas + 4 * vocabulary) * plan.chunk
    if rows <= fit:
        assert plan == (rows, rows)
    elif fit > 1:
        assert 0 < plan.keep <= rows and plan.chunk >= 1 and taken <= budget
        assert plan.keep == rows or deltas * plan.keep > budget / 2
    else:
        assert plan == (0, 1)


def test_rows_of_logits_are_aligned_on_an_accelerator():
    buffer = logits_buffer(torch.empty(0, dtype=torch.bfloat16, device="meta"), 5, 50257)
    assert buffer.shape == (5, 50257) and buffer.stride() == (50304, 1)
    assert logits_buffer(torch.empty(0, device="meta"), 5, 128256).is_contiguous()
    assert logits_buffer(torch.empty(0), 5, 50257).is_contiguous()
