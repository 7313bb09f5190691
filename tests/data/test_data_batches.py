"""Batches are ragged, row after row, right padded and shifted, shown as small matrices."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from wrpo.data import DataError, PreferenceCollator, SFTCollator, load_examples, tokenize_examples

ONE = {
    "prompt_ids": [1, 2, 3],
    "response_ids": [[4, 5], [6], [7, 8, 9]],
    "role": ["source", "target", "rejected"],
    "share": [1.0, 1.0, 1.0],
}
TWO = {
    "prompt_ids": [1, 2],
    "response_ids": [[3], [4, 5, 6], [7, 8], [9]],
    "role": ["source", "source", "target", "rejected"],
    "share": [0.25, 0.75, 1.0, 1.0],
}
PAIR = {"prompt_ids": [1], "response_ids": [[2], [3]], "role": ["target", "rejected"], "share": [1.0, 1.0]}
_ = -100


def test_a_preference_batch_is_row_after_row_right_padded_and_shifted():
    batch = PreferenceCollator(pad_token_id=0)([ONE, TWO])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 0],  # ONE: source, target, rejected
        [1, 2, 3, 6, 0, 0],
        [1, 2, 3, 7, 8, 9],
        [1, 2, 3, 0, 0, 0],  # TWO: two sources, target, rejected
        [1, 2, 4, 5, 6, 0],
        [1, 2, 7, 8, 0, 0],
        [1, 2, 9, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [_, _, 4, 5, _, _],  # the last prompt token predicts the first response token
        [_, _, 6, _, _, _],
        [_, _, 7, 8, 9, _],  # the last position predicts nothing
        [_, 3, _, _, _, _],
        [_, 4, 5, 6, _, _],
        [_, 7, 8, _, _, _],
        [_, 9, _, _, _, _],
    ]
    assert batch["num_responses"].tolist() == [3, 4]
    assert batch["role"].tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert batch["share"].tolist() == [1, 1, 1, 0.25, 0.75, 1, 1]
    assert batch["lengths"] == [[2, 1, 3], [1, 3, 2, 1]]
    assert {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "num_responses": torch.int64,
        "role": torch.int64,
        "share": torch.float32,
    }


def test_pairs_and_triples_make_one_batch():
    batch = PreferenceCollator(pad_token_id=0)([PAIR, ONE, PAIR])
    assert batch["num_responses"].tolist() == [2, 3, 2]
    assert batch["role"].tolist() == [1, 2, 0, 1, 2, 1, 2]
    assert batch["input_ids"][[0, 1, -1], :2].tolist() == [[1, 2], [1, 3], [1, 3]]


def test_reference_log_probs_follow_their_sequences():
    rows = [ONE | {"ref_logp": [-1.0, -2.0, -3.0]}, TWO | {"ref_logp": [-4.0, -5.0, -6.0, -7.0]}]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    assert batch["ref_logp"].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([-1.0] * 3, [-1.0] * 3, "row 2, field 'ref_logp': expected 4 finite log-probs, .* got 3: "),
        ([-1.0] * 4, [-1.0] * 4, "row 1, field 'ref_logp': expected 3 finite log-probs, .* got 4: "),
        ([-1.0] * 3, None, "row 2, field 'ref_logp': expected 4 finite log-probs, .* got none"),
        (None, [-1.0] * 4, "row 1, field 'ref_logp': expected 3 finite log-probs, .* got none"),
    ],
)
def test_reference_log_probs_that_do_not_fit_their_row_are_refused(first, second, words):
    rows = [
        row if values is None else row | {"ref_logp": values}
        for row, values in zip((ONE, TWO), (first, second), strict=True)
    ]
    with pytest.raises(DataError, match=words):
        PreferenceCollator(pad_token_id=0)(rows)


def test_shares_follow_the_rewards_where_a_temperature_is_given():
    rows = [ONE | {"reward": [-3.0, 9.0, None]}, TWO | {"reward": [1.0, 0.0, None, None]}, PAIR]
    shares = PreferenceCollator(0, reward_temperature=0.5)(rows)["share"]
    expected = [1.0, 1.0, 1.0, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(shares, torch.tensor(expected))
    large = PreferenceCollator(0, reward_temperature=1e-3)([TWO | {"reward": [-1e6, 1e6, 0.0, 0.0]}])
    assert large["share"].tolist() == [0.0, 1.0, 1.0, 1.0]


def test_source_ids_name_the_model_of_each_source_answer():
    rows = [ONE | {"model": ["b", "me", "me"]}, TWO | {"model": ["a", "unheard of", None, None]}, TWO, PAIR]
    ids = PreferenceCollator(0, source_models=["a", "b", "source 2"])(rows)["source_id"]
    # b; a, and a model that is not listed; rows without names go by place; a pair has no source
    assert ids.tolist() == [1, -1, -1, 0, 3, -1, -1, 3, 2, -1, -1, -1, -1]


def test_log_probs_under_the_source_models_follow_their_sequences():
    rows = [
        ONE | {"source_logp": [[-1.0, -1.5], [-2.0, -2.5], [-3.0, -3.5]]},
        TWO | {"source_logp": [[-4.0, -4.5], [-5.0, -5.5], [-6.0, -6.5], [-7.0, -7.5]]},
    ]
    got = PreferenceCollator(0, with_source_logp=True)(rows)["source_logp"]
    assert got[:, 0].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    assert torch.equal(got[:, 1], got[:, 0] - 0.5)


@pytest.mark.parametrize(
    ("collator", "options", "words"),
    [
        (PreferenceCollator, {"empty_response": "skip"}, "empty_response: expected one of raise, zero, got 'skip'"),
        (PreferenceCollator, {"reward_temperature": 0.0}, "reward_temperature: expected a finite number > 0, got 0.0"),
        (PreferenceCollator, {"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected a whole number >= 1, got 0"),
        (SFTCollator, {"pad_to_multiple_of": 8.0}, "pad_to_multiple_of: expected a whole number >= 1, got 8.0"),
        (SFTCollator, {"pad_token_id": None}, "pad_token_id: expected a whole number >= 0, got None"),
    ],
)
def test_an_option_that_no_batch_could_be_made_with_is_refused_at_once(collator, options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        collator(**{"pad_token_id": 0, **options})


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"reward_temperature": 1.0}, {"reward": None}, "row 2, field 'reward': expected 2 rewards"),
        ({"with_source_logp": True}, {"source_logp": None}, "row 2, field 'source_logp': expected 4 lists of 1 log"),
        ({"with_source_logp": True}, {"source_logp": [[-1.0]] * 3}, "row 2, field 'source_logp': expected 4 lists"),
        ({"with_source_logp": True}, {"source_logp": [[-1.0] * 2] * 4}, "row 2, field 'source_logp': expected 4 lists"),
    ],
)
def test_a_column_that_is_asked_for_and_does_not_fit_its_row_is_named(options, change, words):
    one = ONE | {"reward": [1.0, None, None], "source_logp": [[-1.0]] * 3}
    with pytest.raises(DataError, match="batch, " + words):
        PreferenceCollator(0, **options)([one, TWO | change])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"response_ids": [[3], [4], [], [9]]},
            r"field 'response_ids\[2\]': .*, got \[\] after the prompt_ids \[1, 2\]",
        ),
        ({"response_ids": [[3], [], [7], [9]]}, r"field 'response_ids\[1\]'"),
        ({"prompt_ids": []}, r"field 'response_ids\[0\]': .*, got \[3\] after"),  # nothing predicts it
    ],
)
def test_a_response_without_a_token_to_count_is_refused_unless_it_counts_zero(change, words):
    with pytest.raises(DataError, match="batch, row 2, " + words):
        PreferenceCollator(pad_token_id=0)([ONE, TWO | change])
    batch = PreferenceCollator(pad_token_id=0, empty_response="zero")([ONE, TWO | change])
    assert not (batch["labels"] != _).any(1).all()


def test_an_sft_batch_holds_the_source_answer_of_largest_share_or_the_targets():
    tie = TWO | {"share": [0.5, 0.5, 1.0, 1.0]}
    batch = SFTCollator(pad_token_id=0)([ONE, TWO, tie, PAIR])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "lengths"}
    assert batch["lengths"] == [[2], [3], [1], [1]]
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 4, 5, 6],  # weight 0.75
        [1, 2, 3, 0, 0],  # the first of equals
        [1, 2, 0, 0, 0],  # a pair's better answer
    ]
    assert batch["labels"].tolist() == [
        [_, _, 4, 5, _], [_, 4, 5, 6, _], [_, 3, _, _, _], [2, _, _, _, _]
    ]  # fmt: skip


@pytest.mark.parametrize("collator", [PreferenceCollator, SFTCollator])
def test_padding_to_a_multiple_adds_only_padding(collator):
    plain, padded = (collator(0, multiple)([ONE, TWO]) for multiple in (None, 8))
    width = plain["input_ids"].shape[1]
    assert padded["input_ids"].shape[1] == 8
    for name, empty in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(padded[name][:, :width], plain[name])
        assert (padded[name][:, width:] == empty).all()


def test_sft_rows_go_from_file_to_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = load_examples([{"prompt": "2 + 3?", "source_chosen": ["five", "V"]}], stage="sft")
    tokenizer = tiny_tokenizer()
    tokens = tokenize_examples(rows, tokenizer)
    assert set(tokens.column_names) == {"prompt_ids", "response_ids", "role", "share", "model", "reward"}
    assert len(tokens[0]["response_ids"]) == 1
    batch = SFTCollator(tokenizer.pad_token_id)(list(tokens))
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "five<|im_end|>"
