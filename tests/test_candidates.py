"""Scored candidates become triples: who wins, who is dropped and why, the same whatever the order of the rows."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import datasets
import pytest
from tiny_tokenizer import tiny_tokenizer

from wrpo.candidates import make_triples, write_triples
from wrpo.data import DataError, load_triples, tokenize_triples


def answers(prompt_id: str, **rewards: list[float]) -> list[dict]:
    """One candidate for each reward of each model; the response spells out which it is."""
    return [
        {
            "prompt_id": prompt_id,
            "prompt": f"question {prompt_id}",
            "model": model,
            "sample": sample,
            "response": f"{prompt_id}/{model}/{sample}",
            "reward": reward,
        }
        for model, scores in rewards.items()
        for sample, reward in enumerate(scores)
    ]


A = answers("a", big=[0.5, 0.9], small=[0.7], target=[0.2, 0.6, 0.1])
B = answers("b", big=[0.3], small=[0.8], target=[0.5, 0.4])


def test_the_best_source_and_the_best_and_worst_target_answers_make_the_triple():
    (triple,), report = make_triples(A)
    assert triple == {
        "prompt_id": "a",
        "prompt": "question a",
        "source_chosen": ["a/big/1"],
        "source_model": ["big"],
        "source_weight": [1.0],
        "target_chosen": "a/target/1",
        "rejected": "a/target/2",
        "source_reward": [0.9],
        "target_reward": 0.6,
        "rejected_reward": 0.1,
    }
    assert str(report) == "6 candidates for 1 prompts -> 1 triples; no bad rows\n  100.0%  big"


def test_the_report_gives_the_share_of_prompts_that_each_source_won():
    _, report = make_triples(A + B + answers("c", big=[1.0], target=[0.0, 1.0]))
    assert report.won == {"big": 2, "small": 1}
    assert "66.7%  big\n   33.3%  small" in str(report)


def test_several_sources_give_the_best_answer_of_each_of_the_best_models():
    rows = A + answers("a", third=[0.8], fourth=[0.6])
    (triple,), _ = make_triples(rows, num_sources=3)
    assert triple["source_chosen"] == ["a/big/1", "a/third/0", "a/small/0"]
    assert triple["source_weight"] == [1 / 3] * 3
    assert load_triples([triple])[0]["source_model"] == ["big", "third", "small"]


def test_a_weight_temperature_shares_by_softmax_of_the_reward():
    (triple,), _ = make_triples(A, num_sources=2, weight_temperature=0.1)
    best, second = math.exp(0.9 / 0.1), math.exp(0.7 / 0.1)
    assert triple["source_weight"] == pytest.approx([best / (best + second), second / (best + second)], rel=1e-12)


def test_any_order_of_the_rows_gives_the_same_triples():
    tied = answers("t", a=[0.9, 0.9], b=[0.9], c=[0.9], d=[0.1, 0.9], target=[0.5, 0.1, 0.5, 0.1])
    expected, _ = make_triples(tied, num_sources=2)
    assert expected[0]["source_chosen"] == ["t/a/0", "t/b/0"]
    assert (expected[0]["target_chosen"], expected[0]["rejected"]) == ("t/target/0", "t/target/3")
    rng = random.Random(0)
    for _ in range(20):
        rng.shuffle(tied)
        assert make_triples(tied, num_sources=2)[0] == expected


DROPPED = {
    "no source": (answers("x", target=[0.1, 0.9]), {}, "no answer of a source model"),
    "no target": (answers("x", big=[0.1]), {}, "no answer of 'target'"),
    "one target answer": (answers("x", big=[0.1], target=[0.9]), {}, "no two answers of 'target' that differ"),
    "equal target rewards": (answers("x", big=[0.1], target=[0.9, 0.9]), {}, "no two answers of 'target' that differ"),
    "target gap": (answers("x", big=[0.9], target=[0.5, 0.25]), {"min_target_gap": 0.3}, "target gap below 0.3"),
    "source gap": (answers("x", big=[0.5], target=[0.9, 0.25]), {"min_source_gap": 0.3}, "source gap below 0.3"),
    "second source's gap": (
        answers("x", big=[0.9], small=[0.5], target=[0.9, 0.25]),
        {"min_source_gap": 0.3, "num_sources": 2},
        "source gap below 0.3",
    ),
}


@pytest.mark.parametrize(("rows", "options", "reason"), DROPPED.values(), ids=DROPPED)
def test_a_prompt_that_prefers_nothing_is_dropped_with_its_reason(rows, options, reason):
    keep = answers("k", big=[1.0], small=[0.9], target=[0.0, 1.0])
    triples, report = make_triples(rows + keep, **options)
    assert [triple["prompt_id"] for triple in triples] == ["k"]
    assert report.dropped.total() == 1
    assert f"dropped 1: {reason}" in str(report)


def test_equal_texts_prefer_nothing_whatever_their_rewards():
    rows = answers("x", big=[0.9], target=[0.1, 0.8])
    for row in rows:
        row["response"] = "same"
    with pytest.raises(DataError, match=r"(?s)at least one triple.*dropped 1: no two answers of 'target' that differ"):
        make_triples([rows[0] | {"response": "other"}, *rows[1:]])


def test_a_gap_just_reached_is_kept():
    assert (
        len(make_triples(answers("x", big=[0.5], target=[0.5, 0.25]), min_target_gap=0.25, min_source_gap=0.25)[0]) == 1
    )


BAD = {
    "no reward": ("reward", {"reward": None}),
    "reward is NaN": ("reward", {"reward": math.nan}),
    "reward is text": ("reward", {"reward": "0.5"}),
    "empty response": ("response", {"response": " "}),
    "no model": ("model", {"model": None}),
    "prompt is a number": ("prompt", {"prompt": 3}),
    "prompt of another id": ("prompt", {"prompt": "question b"}),
    "sample is text": ("sample", {"sample": "first"}),
}


@pytest.mark.parametrize(("field", "change"), BAD.values(), ids=BAD)
def test_a_bad_candidate_is_named_or_skipped_and_counted(field, change):
    rows = [A[0], A[1] | change, *A[2:]]
    with pytest.raises(DataError, match=f"rows, row 2, field '{field}'"):
        make_triples(rows)
    (triple,), report = make_triples(rows, skip_bad_rows=True)
    assert triple["source_chosen"] == ["a/small/0"], "the bad row was the best source answer"
    assert "5 candidates for 1 prompts -> 1 triples; 1 bad row skipped" in str(report)


@pytest.mark.parametrize("options", [{"num_sources": 0}, {"weight_temperature": 0.0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        make_triples(A, **options)


def test_written_triples_load_again(tmp_path):
    triples, _ = make_triples(A + answers("é", big=[1.0], target=[0.0, 1.0]))
    write_triples(triples, tmp_path / "new folder" / "triples.jsonl")
    assert [json.loads(line) for line in (tmp_path / "new folder" / "triples.jsonl").open(encoding="utf-8")] == triples
    assert load_triples(tmp_path / "new folder" / "triples.jsonl")["target_chosen"][:] == ["a/target/1", "é/target/1"]


@pytest.mark.skipif(
    "WRPO_REAL_DATA" not in os.environ, reason="WRPO_REAL_DATA names no folder with candidates.jsonl.gz"
)
def test_real_candidates_become_triples_and_train(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from wrpo import WRPOConfig, WRPOTrainer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    triples, report = make_triples(Path(os.environ["WRPO_REAL_DATA"]) / "candidates.jsonl.gz", min_target_gap=0.01)
    assert report.prompts == report.triples + report.dropped.total()
    assert report.won.total() == report.triples > 100
    for triple in triples:
        assert triple["target_reward"] - triple["rejected_reward"] >= 0.01

    tokenizer = tiny_tokenizer()
    rows = tokenize_triples(load_triples(triples[:12]), tokenizer, max_length=128, max_prompt_length=64)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape))
    config = WRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        draw_curves=False,
    )
    trainer = WRPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    # Policy and reference are one at the first step; bf16 or not, log 2 is all that is left of the loss.
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
