"""Scored candidates become SFT rows and triples: who wins, who is left out and why, in any order of the rows."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import datasets
import pytest
from scored_answers import answers, many_answers
from tiny_tokenizer import tiny_tokenizer

from wrpo.building import BuildReport, BuildSettings, build_rows
from wrpo.data import DataError, load_examples, tokenize_examples

A = answers("a", big=[0.5, 0.9], small=[0.7], target=[0.2, 0.6, 0.1])
B = answers("b", big=[0.3], small=[0.8], target=[0.5, 0.4])


def triples_of(rows: list[dict], **options) -> tuple[dict[str, dict], BuildReport]:
    """Triples by prompt id, all prompts in that part, and the report."""
    built = build_rows(rows, BuildSettings(**{"sft_share": 0} | options))
    return {triple["prompt_id"]: triple for triple in built.triples}, built.report


def only_triple(rows: list[dict], **options) -> dict:
    (triple,) = triples_of(rows, **options)[0].values()
    return triple


# -- the paper's choice -----------------------------------------------------------------------------------------------


def test_the_best_source_and_the_best_and_worst_target_answers_make_the_triple():
    triples, report = triples_of(A)
    assert triples["a"] == {
        "prompt_id": "a",
        "prompt": "question a",
        "source_chosen": ["a/big/1"],
        "source_model": ["big"],
        "source_weight": [1.0],
        "source_reward": [0.9],
        "target_chosen": "a/target/1",
        "rejected": "a/target/2",
        "target_reward": 0.6,
        "rejected_reward": 0.1,
        "rejected_model": "target",
    }
    assert str(report).startswith("6 candidates for 1 prompts -> 1 triples; no bad rows\n")


def test_the_report_gives_the_share_of_prompts_that_each_source_won_and_the_means():
    _, report = triples_of(A + B + answers("c", big=[1.0], target=[0.0, 1.0]))
    assert report.won == {"big": 2, "small": 1}
    assert "  66.67%  big\n  33.33%  small" in str(report)
    assert report.means["source_chosen"].reward == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    assert report.means["rejected"].chars == len("a/target/0")


def test_a_third_of_the_prompts_gives_sft_rows_and_no_triple():
    rows = [row for number in range(3000) for row in answers(f"{number}", big=[0.9], target=[0.1, 0.2])]
    built = build_rows(rows, BuildSettings())
    sft, triples = ({row["prompt_id"] for row in part} for part in (built.sft, built.triples))
    assert not sft & triples
    assert len(sft | triples) == 3000
    # A fair draw of 3000 with probability 1/3 has standard deviation 26; 130 is five of them.
    assert abs(len(sft) - 1000) < 130
    assert built.sft[0] == {
        "prompt_id": built.sft[0]["prompt_id"],
        "prompt": f"question {built.sft[0]['prompt_id']}",
        "source_chosen": [f"{built.sft[0]['prompt_id']}/big/0"],
        "source_model": ["big"],
        "source_weight": [1.0],
        "source_reward": [0.9],
    }


def test_the_part_of_a_prompt_hangs_on_the_seed_and_its_id_alone():
    whole = build_rows(many_answers(60), BuildSettings())
    sft = {row["prompt_id"] for row in whole.sft}
    others = [row | {"prompt": "other", "reward": -row["reward"]} for row in many_answers(30)]
    half = build_rows(others, BuildSettings())
    assert {row["prompt_id"] for row in half.sft} == {name for name in sft if int(name[1:]) < 30}
    assert {row["prompt_id"] for row in build_rows(many_answers(60), BuildSettings(seed=1)).sft} != sft


def test_any_order_of_the_rows_gives_the_same_rows_in_the_same_order():
    rows = many_answers(40)
    options = BuildSettings(num_sources=2, weight_temperature=0.5)
    expected = build_rows(rows, options)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(rows)
        again = build_rows(rows, options)
        assert (again.triples, again.sft) == (expected.triples, expected.sft)
        assert str(again.report) == str(expected.report)


def test_ties_go_by_model_name_then_sample_number():
    tied = answers("t", a=[0.9, 0.9], b=[0.9], c=[0.9], d=[0.1, 0.9], target=[0.5, 0.1, 0.5, 0.1])
    triple = only_triple(tied, num_sources=2)
    assert triple["source_chosen"] == ["t/a/0", "t/b/0"]
    assert (triple["target_chosen"], triple["rejected"]) == ("t/target/0", "t/target/3")


def test_the_sft_stage_needs_no_answer_of_the_target_and_lists_the_prompts_it_has_to_answer():
    rows = [row for row in many_answers(60) if row["model"] != "target"]
    built = build_rows(rows, BuildSettings(stage="sft"))
    assert built.sft == build_rows(many_answers(60), BuildSettings()).sft
    assert {row["prompt_id"] for row in built.prompts} == {f"p{n}" for n in range(60)} - {
        row["prompt_id"] for row in built.sft
    }
    assert set(built.prompts[0]) == {"prompt_id", "prompt"}
    with pytest.raises(DataError, match=r"at least one triple.*no answer of 'target'.*--stage sft"):
        build_rows(rows, BuildSettings())


# -- beyond it --------------------------------------------------------------------------------------------------------


def test_several_sources_give_the_best_answer_of_each_of_the_best_models():
    triple = only_triple(A + answers("a", third=[0.8], fourth=[0.6]), num_sources=3)
    assert triple["source_chosen"] == ["a/big/1", "a/third/0", "a/small/0"]
    assert triple["source_weight"] == [1 / 3] * 3
    assert load_examples([triple])[0]["model"][:3] == ["big", "third", "small"]


def test_a_weight_temperature_shares_by_softmax_of_the_reward():
    triple = only_triple(A, num_sources=2, weight_temperature=0.1)
    best, second = math.exp(0.9 / 0.1), math.exp(0.7 / 0.1)
    assert triple["source_weight"] == pytest.approx([best / (best + second), second / (best + second)], rel=1e-12)


def test_the_largest_rewards_and_the_smallest_temperature_give_finite_weights():
    triple = only_triple(answers("a", big=[1e30], small=[-1e30], target=[1e30, -1e30]), num_sources=2,
                         weight_temperature=1e-300)  # fmt: skip
    assert triple["source_weight"] == [1.0, 0.0]


RANKED = answers("a", big=[0.9, 0.8], small=[0.7], third=[0.6], target=[0.2, 0.1])


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ({"source_rank": 2}, ["a/big/1"]),
        ({"source_rank": 3}, ["a/small/0"]),
        ({"source_rank": 2, "num_sources": 2}, ["a/big/1", "a/small/0"]),
    ],
)
def test_a_rank_starts_from_the_nth_best_answer_of_all_sources(options, sources):
    assert only_triple(RANKED, **options)["source_chosen"] == sources


@pytest.mark.parametrize(
    ("origin", "rejected"), [("target", "target/1"), ("source", "small/0"), ("same_source", "big/1")]
)
def test_the_rejected_answer_can_be_the_worst_of_a_source(origin, rejected):
    rows = answers("a", big=[0.9, 0.4], small=[0.1], target=[0.8, 0.3])
    triple = only_triple(rows, rejected=origin)
    assert triple["rejected"] == f"a/{rejected}"
    assert triple["rejected_model"] == rejected.split("/")[0]
    assert (triple["source_chosen"], triple["target_chosen"]) == (["a/big/0"], "a/target/0")


def test_one_text_of_several_models_and_samples_is_one_answer_under_its_best_reward():
    rows = answers("a", big=[0.9], small=[0.8], third=[0.7], target=[0.5, 0.4, 0.1])
    for row in rows[:2]:
        row["response"] = "said by both"
    rows[4]["response"] = rows[3]["response"] + "\n"
    triples, report = triples_of(rows, num_sources=2)
    assert triples["a"]["source_chosen"] == ["said by both", "a/third/0"]
    assert triples["a"]["source_model"] == ["big", "third"]
    assert report.dropped_answers == {"same text as a better answer": 2}
    assert "        2  same text as a better answer" in str(report)


def test_answers_beyond_a_length_limit_are_left_out_before_anything_is_chosen():
    rows = answers("a", big=[0.9, 0.8, 0.7], target=[0.5, 0.1])
    rows[0]["response"], rows[1]["response"], rows[2]["response"] = " x ", "y" * 30, "good answer"
    triples, report = triples_of(rows, min_chars=2, max_chars=20)
    assert triples["a"]["source_chosen"] == ["good answer"]
    assert report.dropped_answers == {"shorter than 2 characters": 1, "longer than 20 characters": 1}


def test_an_empty_answer_is_no_fault_of_the_row_and_left_out():
    rows = answers("a", big=[0.9], small=[0.8], target=[0.5, 0.1])
    rows[0]["response"] = " \n"
    triples, report = triples_of(rows)
    assert triples["a"]["source_model"] == ["small"]
    assert report.dropped_answers == {"empty": 1}


def test_tokens_are_counted_by_the_tokenizer_that_is_named(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    rows = answers("a", big=[0.9, 0.8], target=[0.5, 0.1]) + answers("b", big=[0.9], target=[0.5, 0.1])
    rows[0]["response"], rows[1]["response"] = "five " * 12, "hello world"
    for row in rows[-3:]:
        row["prompt"] = "zq" * 40  # no word of the tokenizer's, so a token a letter
    most = max(len(tokenizer(row["response"]).input_ids) for row in rows[1:])
    assert len(tokenizer(rows[0]["response"]).input_ids) > most
    triples, report = triples_of(rows, tokenizer=str(tmp_path), max_tokens=most, max_prompt_tokens=60)
    assert list(triples) == ["a"]
    assert triples["a"]["source_chosen"] == ["hello world"]
    assert report.dropped_answers[f"longer than {most} tokens"] == 1
    assert report.dropped_prompts == {"prompt longer than 60 tokens": 1}


LEFT_OUT = {
    "no source": (answers("x", target=[0.1, 0.9]), {}, "no answer of a source model"),
    "no target": (answers("x", big=[0.1]), {}, "no answer of 'target'"),
    "one target answer": (answers("x", big=[0.1], target=[0.9]), {}, "no two answers of 'target' that differ"),
    "equal target rewards": (answers("x", big=[0.1], target=[0.9, 0.9]), {}, "no two answers of 'target' that differ"),
    "target gap": (answers("x", big=[0.9], target=[0.5, 0.25]), {"min_target_gap": 0.3}, "target gap below 0.3"),
    "wide target gap": (answers("x", big=[0.9], target=[1, 0.25]), {"max_target_gap": 0.7}, "target gap above 0.7"),
    "source gap": (answers("x", big=[0.5], target=[0.9, 0.25]), {"min_source_gap": 0.3}, "source gap below 0.3"),
    "wide source gap": (answers("x", big=[0.9], target=[0.5, 0.0]), {"max_source_gap": 0.8}, "source gap above 0.8"),
    "rank": (answers("x", big=[0.5], target=[0.9, 0.25]), {"source_rank": 2}, "no 2 different source answers"),
    "poor source": (
        answers("x", big=[0.3], target=[0.9, 0.25]),
        {"min_chosen_reward": 0.4},
        "reward of source_chosen below 0.4",
    ),
    "poor target": (
        answers("x", big=[0.9], target=[0.3, 0.25]),
        {"min_chosen_reward": 0.4},
        "reward of target_chosen below 0.4",
    ),
    "good rejected": (
        answers("x", big=[0.9], target=[0.9, 0.8]),
        {"max_rejected_reward": 0.7},
        "reward of rejected above 0.7",
    ),
    "source no worse": (
        answers("x", big=[0.9, 0.8], target=[0.3]),
        {"rejected": "source"},
        "target_chosen no better than rejected",
    ),
    "source's only answer": (
        answers("x", big=[0.9], small=[0.1], target=[0.3]),
        {"rejected": "same_source"},
        "no second answer of a source to reject",
    ),
    "long prompt": (answers("x" * 20, big=[0.1], target=[0, 1]), {"max_prompt_chars": 20}, "prompt longer than 20"),
}


@pytest.mark.parametrize(("rows", "options", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_prompt_that_prefers_nothing_is_left_out_with_its_reason(rows, options, reason):
    bad_source = [0.0] if options.get("rejected") else []
    keep = answers("k", big=[0.75, 0.7, *bad_source], target=[0.0, 0.5])
    triples, report = triples_of(rows + keep, **options)
    assert list(triples) == ["k"]
    assert report.dropped_prompts.total() == 1
    assert f"prompts left out\n          1  {reason}" in str(report)


def test_only_the_sources_that_miss_a_gap_or_a_reward_are_left_out():
    rows = answers("x", big=[0.9], small=[0.5], target=[0.9, 0.25])
    assert only_triple(rows, num_sources=2, min_source_gap=0.3)["source_model"] == ["big"]
    assert only_triple(rows, num_sources=2, min_chosen_reward=0.6)["source_model"] == ["big"]
    assert only_triple(rows, num_sources=2, max_source_gap=0.5)["source_model"] == ["small"]


def test_a_gap_just_reached_is_kept():
    options = {"min_target_gap": 0.25, "max_target_gap": 0.25, "min_source_gap": 0.25, "max_source_gap": 0.25}
    assert only_triple(answers("x", big=[0.5], target=[0.5, 0.25]), **options)


def test_one_text_is_never_chosen_and_rejected():
    rows = answers("x", big=[0.9], small=[0.8], target=[0.1, 0.8])
    rows[0]["response"] = rows[2]["response"]
    assert only_triple(rows, num_sources=2)["source_model"] == ["small"]
    with pytest.raises(DataError, match=r"at least one.*source_chosen and rejected are one text 1"):
        triples_of([row for row in rows if row["model"] != "small"])
    rows[3]["response"] = rows[2]["response"]
    with pytest.raises(DataError, match=r"at least one.*no two answers of 'target' that differ"):
        triples_of(rows)


OUT_OF_RANGE = [
    {"num_sources": 0},
    {"source_rank": 0},
    {"weight_temperature": 0.0},
    {"sft_share": 1.5},
    {"max_target_gap": math.nan},
    {"min_source_gap": -math.inf},
    {"max_rejected_reward": math.nan},
    {"weight_temperature": math.inf},
    {"seed": -1},
    {"max_chars": 0},
    {"max_source_gap": 0.1, "min_source_gap": 0.2},
    {"shard": "4/4"},
    {"shard": "half"},
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        BuildSettings(**options)


def test_limits_in_tokens_ask_for_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer: expected"):
        BuildSettings(max_tokens=10)


# -- real answers -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "WRPO_REAL_DATA" not in os.environ, reason="WRPO_REAL_DATA names no folder with candidates.jsonl.gz"
)
def test_real_candidates_become_triples_and_train(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from wrpo import WRPOConfig, WRPOTrainer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    candidates = Path(os.environ["WRPO_REAL_DATA"]) / "candidates.jsonl.gz"
    triples, sft, _, report = build_rows(candidates, BuildSettings(min_target_gap=0.01))
    assert report.prompts == len(triples) + len(sft) + report.dropped_prompts.total()
    assert report.won.total() == report.prompts
    assert len(triples) > 50 and len(sft) > 100
    assert len(report.won) > 5, "ten sources, most of them best somewhere"
    for triple in triples:
        assert triple["target_reward"] - triple["rejected_reward"] >= 0.01

    tokenizer = tiny_tokenizer()
    rows = tokenize_examples(load_examples(triples[:12]), tokenizer, max_length=128, max_prompt_length=64)
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
