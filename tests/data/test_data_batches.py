"""Batches are source-major, right padded and shifted, shown as small matrices."""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from wrpo.data import DataError, PreferenceCollator, SFTCollator, load_triples, tokenize_triples

ONE = {
    "prompt_ids": [1, 2, 3],
    "source_ids": [[4, 5]],
    "source_weight": [1.0],
    "target_ids": [6],
    "rejected_ids": [7, 8, 9],
}
TWO = {
    "prompt_ids": [1, 2],
    "source_ids": [[3], [4, 5, 6]],
    "source_weight": [0.25, 0.75],
    "target_ids": [7, 8],
    "rejected_ids": [9],
}
_ = -100


def test_a_preference_batch_is_source_major_right_padded_and_shifted():
    batch = PreferenceCollator(pad_token_id=0)([ONE, TWO])
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 0],  # ONE, source 1
        [1, 2, 3, 0, 0, 0],  # TWO, source 1
        [1, 2, 3, 4, 5, 0],  # ONE has no source 2: source 1 again, with weight 0
        [1, 2, 4, 5, 6, 0],  # TWO, source 2
        [1, 2, 3, 6, 0, 0],  # ONE, target
        [1, 2, 7, 8, 0, 0],  # TWO, target
        [1, 2, 3, 7, 8, 9],  # ONE, rejected
        [1, 2, 9, 0, 0, 0],  # TWO, rejected
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
    ]
    assert batch["labels"].tolist() == [
        [_, _, 4, 5, _, _],  # the last prompt token predicts the first response token
        [_, 3, _, _, _, _],
        [_, _, 4, 5, _, _],
        [_, 4, 5, 6, _, _],
        [_, _, 6, _, _, _],
        [_, 7, 8, _, _, _],
        [_, _, 7, 8, 9, _],  # the last position predicts nothing
        [_, 9, _, _, _, _],
    ]
    assert batch["source_weight"].tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "source_weight": torch.float32,
    }


def test_reference_log_probs_follow_their_sequences():
    rows = [ONE | {"ref_logp": [-1.0, -2.0, -3.0]}, TWO | {"ref_logp": [-4.0, -5.0, -6.0, -7.0]}]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    # source 1 of both, source 2 (ONE repeats its first), target, rejected
    assert batch["ref_logp"].tolist() == [-1.0, -4.0, -1.0, -5.0, -2.0, -6.0, -3.0, -7.0]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([-1.0] * 3, [-1.0] * 3, "row 2, field 'ref_logp': expected 4 log-probs, .* got 3: "),
        ([-1.0] * 4, [-1.0] * 4, "row 1, field 'ref_logp': expected 3 log-probs, .* got 4: "),
        ([-1.0] * 3, None, "row 2, field 'ref_logp': expected 4 log-probs, .* got none"),
        (None, [-1.0] * 4, "row 1, field 'ref_logp': expected 3 log-probs, .* got none"),
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
    rows = [ONE | {"source_reward": [-3.0]}, TWO | {"source_reward": [1.0, 0.0]}]
    shares = PreferenceCollator(0, reward_temperature=0.5)(rows)["source_weight"]
    expected = [[1.0, 0.0], [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]]
    torch.testing.assert_close(shares, torch.tensor(expected))
    large = PreferenceCollator(0, reward_temperature=1e-3)([TWO | {"source_reward": [-1e6, 1e6]}])
    assert large["source_weight"].tolist() == [[0.0, 1.0]]


def test_source_ids_name_the_model_of_each_answer():
    rows = [ONE | {"source_model": ["b"]}, TWO | {"source_model": ["a", "unheard of"]}, TWO]
    ids = PreferenceCollator(0, source_models=["a", "b", "source 2"])(rows)["source_id"]
    # b, and no second source; a, and a model that is not listed; rows without names go by place
    assert ids.tolist() == [[1, -1], [0, 3], [3, 2]]


def test_log_probs_under_the_source_models_follow_their_sequences():
    rows = [
        ONE | {"source_logp": [[-1.0, -1.5], [-2.0, -2.5], [-3.0, -3.5]]},
        TWO | {"source_logp": [[-4.0, -4.5], [-5.0, -5.5], [-6.0, -6.5], [-7.0, -7.5]]},
    ]
    got = PreferenceCollator(0, with_source_logp=True)(rows)["source_logp"]
    assert got[:, 0].tolist() == [-1.0, -4.0, -1.0, -5.0, -2.0, -6.0, -3.0, -7.0]
    assert torch.equal(got[:, 1], got[:, 0] - 0.5)


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"reward_temperature": 1.0}, {"source_reward": None}, "row 2, field 'source_reward': expected 2 rewards"),
        ({"with_source_logp": True}, {"source_logp": None}, "row 2, field 'source_logp': expected 4 lists of 1 log"),
        ({"with_source_logp": True}, {"source_logp": [[-1.0]] * 3}, "row 2, field 'source_logp': expected 4 lists"),
        ({"with_source_logp": True}, {"source_logp": [[-1.0] * 2] * 4}, "row 2, field 'source_logp': expected 4 lists"),
    ],
)
def test_a_column_that_is_asked_for_and_does_not_fit_its_row_is_named(options, change, words):
    one = ONE | {"source_reward": [1.0], "source_logp": [[-1.0]] * 3}
    with pytest.raises(DataError, match="batch, " + words):
        PreferenceCollator(0, **options)([one, TWO | change])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_ids": []}, r"field 'target_ids': .*, got \[\] after the prompt_ids \[1, 2\]"),
        ({"source_ids": [[3], []]}, r"field 'source_ids\[1\]'"),
        ({"prompt_ids": [], "target_ids": [7]}, r"field 'source_ids\[0\]': .*, got \[3\] after"),  # nothing predicts it
    ],
)
def test_a_response_without_a_token_to_count_is_refused_unless_it_counts_zero(change, words):
    with pytest.raises(DataError, match="batch, row 2, " + words):
        PreferenceCollator(pad_token_id=0)([ONE, TWO | change])
    batch = PreferenceCollator(pad_token_id=0, empty_response="zero")([ONE, TWO | change])
    assert not (batch["labels"] != _).any(1).all()


def test_an_sft_batch_holds_the_source_answer_of_largest_weight():
    tie = TWO | {"source_weight": [0.5, 0.5]}
    batch = SFTCollator(pad_token_id=0)([ONE, TWO, tie])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 4, 5, 6],  # weight 0.75
        [1, 2, 3, 0, 0],  # the first of equals
    ]
    assert batch["labels"].tolist() == [[_, _, 4, 5, _], [_, 4, 5, 6, _], [_, 3, _, _, _]]


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
    rows = load_triples([{"prompt": "2 + 3?", "source_chosen": ["five", "V"]}], targets=False)
    tokenizer = tiny_tokenizer()
    tokens = tokenize_triples(rows, tokenizer)
    assert set(tokens.column_names) == {"prompt_ids", "source_ids", "source_weight", "source_model", "source_reward"}
    batch = SFTCollator(tokenizer.pad_token_id)(list(tokens))
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "five<|im_end|>"
