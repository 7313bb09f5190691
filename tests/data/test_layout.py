"""Tokens in packed and shared rows stand where `wrpo.data.layout` says, each response behind its prompt."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_rows

from wrpo.data import PreferenceCollator, SFTCollator
from wrpo.data import layout as module
from wrpo.data.layout import Layout, place_tokens, rows_of, width_of

LAYOUTS = [Layout("packed"), Layout("shared"), Layout("packed", "blocks"), Layout("shared", "blocks"),
           Layout("packed", "bounds"), Layout("shared", "bounds")]  # fmt: skip
EXAMPLES = [([5, 6], [[7, 8, 9], [10]]), ([11], [[12, 13]])]


def test_a_prompt_stands_once_and_its_responses_go_on_from_it():
    batch = place_tokens(EXAMPLES, 0, Layout("shared"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 2, 0, 0, 0]]
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, 0, 0, 0]]
    first, second = batch["segment"].tolist()
    assert len(set(first)) == 1
    assert second[3:] == [-1] * 3
    assert len({*first, *second}) == 3
    assert batch["labels"].tolist() == [7, 8, 9, 10, 12, 13]
    assert batch["hidden_rows"].tolist() == [1, 2, 3, 1, 6, 7], "the prompt's last token predicts both first tokens"
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]


def test_packed_rows_hold_a_prompt_for_each_response_and_no_more_padding_than_they_must():
    batch = place_tokens(EXAMPLES, 0, Layout("packed"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 10, 0, 0], [11, 12, 13, 0, 0]]
    batch = place_tokens([*EXAMPLES, ([14], [[15]])], 0, Layout("packed"))
    assert batch["input_ids"].tolist()[1:] == [[5, 6, 10, 14, 15], [11, 12, 13, 0, 0]]
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 0, 1]


def test_attention_that_takes_bounds_gets_one_row_without_padding():
    batch = place_tokens(EXAMPLES, 0, Layout("packed", "bounds"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 5, 6, 10, 11, 12, 13]]
    assert batch["segment_bounds"].tolist() == [0, 5, 8, 11]
    assert batch["segment_bounds"].dtype == torch.int32


def test_bounds_of_shared_rows_give_each_response_the_keys_of_its_prompt():
    batch = place_tokens(EXAMPLES, 0, Layout("shared", "bounds"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch["segment_bounds"].tolist() == [0, 6, 9]
    assert batch["query_bounds"].tolist() == [0, 2, 5, 6, 7, 9]
    assert batch["key_bounds"].tolist() == [0, 2, 7, 10, 11, 14]
    assert batch["key_rows"].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 6, 7, 8]


def test_rows_of_blocks_are_whole_blocks():
    batch = place_tokens(EXAMPLES, 0, Layout("shared", "blocks"))
    assert batch["input_ids"].shape == (1, 128)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.attention}")
@pytest.mark.parametrize("limit", [4, 15, 8192], ids=["all beyond it", "some beyond it", "ample"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_response_is_whole_behind_its_prompt_in_its_order(layout, limit, count, monkeypatch):
    monkeypatch.setitem(module.SEGMENT_TOKENS, layout.attention, limit)
    rows = tiny_rows(7, sources=count - 1, targets=1, rejected=1)
    rows[3]["response_ids"][0] = []
    batch = PreferenceCollator(0, empty_response="zero", layout=layout)(rows)
    ids, segment, branch, positions = (
        batch[name].flatten() for name in ("input_ids", "segment", "branch", "position_ids")
    )
    bounds = batch["cu_seqlens"].tolist()
    responses = [(row["prompt_ids"], response) for row in rows for response in row["response_ids"]]
    assert len(bounds) == len(responses) + 1
    for (prompt, response), first, last in zip(responses, bounds, bounds[1:], strict=False):
        assert batch["labels"][first:last].tolist() == response
        places = batch["hidden_rows"][first:last]
        if not response:
            continue
        of_prompt = ((segment == segment[places[0]]) & (branch == 0)).nonzero()[:, 0]
        assert ids[of_prompt].tolist() == prompt
        assert places[0] == of_prompt[-1]
        own = torch.cat([places[1:], places[-1:] + 1])[1 - len(response) :]  # all but the first token
        if len(response) > 1:
            assert ids[own].tolist() == response[1:]
            assert len(branch[own].unique()) == 1
            assert positions[own].tolist() == list(range(len(prompt) + 1, len(prompt) + len(response)))


def test_an_example_that_does_not_fit_a_row_is_spread_over_several_each_with_the_prompt(monkeypatch):
    monkeypatch.setitem(module.SEGMENT_TOKENS, "mask", 10)
    rows = rows_of([(4, [3, 3, 3, 9])], Layout("shared"))
    assert [[segment[1:] for segment in row] for row in rows] == [[(3, 4, 13)], [(0, 2, 10)], [(2, 3, 7)]]
    assert width_of(rows, Layout("shared")) == 13, "one sequence is never cut"


def test_segments_of_several_examples_share_a_row_where_they_fit_beside_the_longest():
    rows = rows_of([(10, [10]), (2, [3]), (4, [2, 2]), (9, [4])], Layout("shared"))
    assert [[segment.example for segment in row] for row in rows] == [[0], [3, 1], [2]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.attention}")
def test_fine_tuning_packs_the_best_response_of_each_row(layout):
    rows = tiny_rows(4)
    batch = SFTCollator(0, layout=layout)(rows)
    assert batch["labels"].tolist() == [id for row in rows for id in row["response_ids"][0]]


def test_padding_is_rounded_up_where_that_is_asked_for():
    assert PreferenceCollator(0, 8, layout=Layout("shared"))(tiny_rows(3))["input_ids"].shape[1] % 8 == 0


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"name": "Shared"}, r"name of a layout must be one of \['padded', 'packed', 'shared'\], got 'Shared'"),
        ({"name": "packed", "attention": "flash"}, "attention of a layout must be one of"),
    ],
)
def test_a_layout_that_there_is_not_is_refused(given, error):
    with pytest.raises(ValueError, match=error):
        Layout(**given)


@pytest.mark.parametrize("collator", [PreferenceCollator, SFTCollator])
def test_a_collator_takes_the_name_of_a_layout(collator):
    assert collator(0, layout="packed").layout == Layout("packed")
    with pytest.raises(TypeError, match="layout must be"):
        collator(0, layout=3)
