"""A trainer takes a model by name or as it is, and data as a file, raw rows or token ids; or says what it wants."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import preference_batch, tiny_model, tiny_rows
from tiny_runs import SETTINGS, training_lines
from tiny_tokenizer import tiny_tokenizer

from wrpo import DPOConfig, SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer
from wrpo.data import DataError, PreferenceCollator
from wrpo.settings import SettingsError
from wrpo_kernels import linear_simpo_loss

PAIRS = [
    {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"},
    {"prompt": "hello", "chosen": "hello world", "rejected": "what?"},
    {"prompt": "the sum of two and three?", "chosen": "five, of course", "rejected": "two"},
    {"prompt": "what is the sum?", "chosen": "five", "rejected": "the sum"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> str:
    """A saved model with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def as_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def settings(tmp_path: Path, **changes) -> dict:
    return {"output_dir": str(tmp_path / "out"), **SETTINGS, **changes}


@pytest.mark.parametrize("form", ["path", "text", "list", "dataset"])
def test_a_models_name_and_a_file_of_pairs_are_enough(form, folder, tmp_path):
    path = as_file(tmp_path)
    data = {"path": path, "text": str(path), "list": PAIRS, "dataset": datasets.Dataset.from_list(PAIRS)}[form]
    args = DPOConfig(**settings(tmp_path, learning_rate=1e-2, num_train_epochs=3))
    trainer = WRPOTrainer(folder, args, train_dataset=data, eval_dataset={"same": PAIRS})
    trainer.train()
    lines = training_lines(trainer)
    assert lines[0]["loss"] == pytest.approx(0.693147, rel=1e-5)
    assert lines[-1]["loss"] < 0.6
    assert trainer.evaluate()["eval_same_rewards/accuracies"] == 1.0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_sft_takes_the_same_file_and_learns_the_better_answers(folder, tmp_path):
    args = SFTConfig(**settings(tmp_path, learning_rate=1e-2, num_train_epochs=3))
    trainer = SFTTrainer(folder, args, train_dataset=as_file(tmp_path))
    answers = [trainer.processing_class.decode(row["response_ids"][0]) for row in trainer.train_dataset]
    assert answers == [f"{row['chosen']}<|im_end|>" for row in PAIRS]
    trainer.train()
    lines = training_lines(trainer)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_an_adapters_config_puts_it_on_and_its_absence_is_the_reference(folder, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    trainer = WRPOTrainer(folder, DPOConfig(**settings(tmp_path, max_steps=1)), train_dataset=PAIRS, peft_config=lora)
    assert isinstance(trainer.model, PeftModel)
    assert trainer.reference_source == "adapter"
    trainer.train()
    assert training_lines(trainer)[0]["loss"] == pytest.approx(0.693147, rel=1e-6)


def test_a_model_of_ones_own_and_rows_of_token_ids_stay_as_they_are(tmp_path):
    model, rows = tiny_model(), tiny_rows()
    trainer = WRPOTrainer(model, WRPOConfig(**settings(tmp_path, reference="none")), train_dataset=rows)
    assert trainer.model is model
    assert trainer.train_dataset is rows


def test_limits_of_the_config_hold_for_raw_rows(folder, tmp_path):
    args = DPOConfig(**settings(tmp_path, max_length=6, max_prompt_length=3, reference="none"))
    rows = WRPOTrainer(folder, args, train_dataset=PAIRS).train_dataset
    assert all(len(row["prompt_ids"]) <= 3 for row in rows)
    assert all(len(row["prompt_ids"]) + len(ids) <= 6 for row in rows for ids in row["response_ids"])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": 3}, TypeError, "model must be a folder, a hub name or a model of transformers, got 3"),
        ({"model": "nowhere"}, SettingsError, "model 'nowhere'"),
        ({"model": tiny_model()}, ValueError, "raw rows need a tokenizer: give processing_class"),
        ({"train_dataset": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
        ({"train_dataset": [{"question": "2 + 3?"}]}, DataError, r"rows, row 1, .* got fields \['question'\]"),
        ({"train_dataset": [{"prompt_ids": [1], "chosen_ids": [2]}]}, DataError, "prompt_ids, response_ids, role"),
        (
            {"train_dataset": datasets.Dataset.from_list(PAIRS).to_iterable_dataset()},
            ValueError,
            "a stream of raw rows",
        ),
        ({"train_dataset": 3}, TypeError, "must be a file, rows or a data set, got 3"),
        (
            {"train_dataset": [{"prompt_ids": [1], "response_ids": [[2], [3]], "share": [1.0, 1.0]}]},
            DataError,
            "expected prompt_ids, response_ids, role and share, .* got the columns prompt_ids, response_ids, share",
        ),
    ],
)
def test_what_it_does_not_understand_is_one_sentence(change, error, words, folder, tmp_path):
    given = {"model": folder, "train_dataset": PAIRS, **change}
    with pytest.raises(error, match=words) as caught:
        WRPOTrainer(given["model"], DPOConfig(**settings(tmp_path, max_steps=1)), train_dataset=given["train_dataset"])
    assert "\n" not in str(caught.value)


def test_without_a_config_the_defaults_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = WRPOTrainer(tiny_model(), train_dataset=tiny_rows(2))
    assert trainer.args.beta == 0.01
    assert torch.isfinite(next(trainer.model.parameters())).all()


@pytest.mark.parametrize(
    ("config", "own", "of_simpo"), [(WRPOConfig, (0.01, 0.0), (10.0, 0.0)), (DPOConfig, (0.1, 0.0), (2.0, 0.5))]
)
def test_beta_and_gamma_follow_the_loss_where_nobody_sets_them(config, own, of_simpo, tmp_path):
    def scale(**settings):
        args = config(output_dir=str(tmp_path), use_cpu=True, **settings)
        return args.beta, args.gamma

    assert {scale(), *(scale(loss_type=name) for name in ("hinge", "ipo", "dpo", "bco_pair"))} == {own}
    assert scale(loss_type=["sigmoid", "sft"]) == own
    assert scale(loss_type="orpo") == scale(loss_type=["cpo"]) == (0.1, 0.0)
    assert scale(loss_type="simpo") == of_simpo
    assert scale(loss_type="simpo", beta=0.1, gamma=0.0) == (0.1, 0.0)


def test_simpo_on_pairs_is_the_loss_of_the_kernels_by_that_name(tmp_path):
    defaults = inspect.signature(linear_simpo_loss).parameters
    options = DPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="simpo").loss_options()
    assert {name: options[name] for name in ("beta", "gamma")} == {
        name: defaults[name].default for name in ("beta", "gamma")
    }


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"train_dataset": {"train": PAIRS, "test": PAIRS}},
            TypeError,
            "one data set, got several: give one of",
        ),
        ({"train_dataset": []}, ValueError, "train_dataset: expected at least one row"),
        ({"train_dataset": [1, 2]}, DataError, "expected rows that are dicts, got 1"),
        ({"args": SFTConfig}, TypeError, "args must be WRPOConfig, got SFTConfig"),
        ({"peft_config": {"r": 4}}, TypeError, "peft_config must be a peft.PeftConfig"),
        ({"loss_type": ["ipo", "dpo2"]}, ValueError, "loss_type: expected one of .*, got 'dpo2'"),
    ],
)
def test_what_is_of_another_kind_is_said_before_anything_is_loaded(change, error, words, folder, tmp_path):
    config = change.pop("args", DPOConfig)
    loss = {"loss_type": change.pop("loss_type")} if "loss_type" in change else {}
    with pytest.raises(error, match=words):
        WRPOTrainer(folder, config(**settings(tmp_path, **loss)), **{"train_dataset": PAIRS, **change})


def test_tokenizer_and_reference_may_be_names_too(folder, tmp_path):
    model = WRPOTrainer(folder, DPOConfig(**settings(tmp_path)), train_dataset=PAIRS).model
    args = DPOConfig(**settings(tmp_path, max_steps=1, reference="copy"))
    trainer = WRPOTrainer(model, args, train_dataset=PAIRS, processing_class=folder, ref_model=folder)
    trainer.train()
    assert training_lines(trainer)[0]["loss"] == pytest.approx(0.693147, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role": ["target", "target"]}, "field 'role': expected a rejected response and a preferred one"),
        ({"role": ["chosen", "rejected"]}, "field 'role': expected 2 of source, target, rejected"),
        ({"role": ["target"]}, "field 'role': expected 2 of source"),
        ({"share": [0.0, 1.0]}, "field 'share': expected 2 shares > 0"),
        ({"share": [1.0, 0.5]}, "field 'share': expected shares of rejected responses that sum to 1"),
        ({"share": [float("nan"), 1.0]}, "field 'share': expected 2 shares > 0"),
        ({"share": None}, "field 'share': expected a value, got none beside"),
        ({"ref_logp": [-1.0, float("nan")]}, "field 'ref_logp': expected 2 finite log-probs"),
    ],
)
def test_a_tokenised_row_that_is_no_example_is_named(change, words):
    row = {"prompt_ids": [1], "response_ids": [[2], [3]], "role": ["target", "rejected"], "share": [1.0, 1.0]}
    with pytest.raises(DataError, match=f"batch, row 2, {words}"):
        PreferenceCollator(0)([row | {"ref_logp": [-1.0, -1.0]}, row | {"ref_logp": [-1.0, -1.0]} | change])


def test_a_reference_that_some_rows_lack_is_refused_before_training(tmp_path):
    rows = tiny_rows(3)
    rows[0]["ref_logp"] = [-1.0, -2.0, -3.0]
    with pytest.raises(ValueError, match=r"ref_logp: .* got none in 2 of 3, the first in row 2"):
        WRPOTrainer(tiny_model(), WRPOConfig(**settings(tmp_path)), train_dataset=rows)


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("column", ["prompt_ids", "response_ids", "role"])
def test_a_tokenised_row_that_lacks_what_the_others_have_is_named(column, form, tmp_path):
    rows = tiny_rows(3)
    rows[1][column] = None
    with pytest.raises(DataError, match=f"row 2, field '{column}': expected a value, got none beside"):
        WRPOTrainer(tiny_model(), WRPOConfig(**settings(tmp_path, reference="none")), train_dataset=form(rows))


def test_a_stream_needs_the_number_of_steps(tmp_path):
    stream = datasets.Dataset.from_list(tiny_rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps: expected the number of steps, since train_dataset is a stream"):
        WRPOTrainer(tiny_model(), WRPOConfig(**settings(tmp_path)), train_dataset=stream)


COLLATORS = {
    "a list": (lambda rows: [preference_batch(rows)], TypeError, "expected a dict of tensors with .*, got list"),
    "without roles": (
        lambda rows: {name: value for name, value in preference_batch(rows).items() if name not in ("role", "share")},
        ValueError,
        "got none of role, share beside .*input_ids",
    ),
    "no tensors": (lambda rows: preference_batch(rows) | {"labels": [[1]]}, ValueError, "got none of labels beside"),
}


@pytest.mark.parametrize(("collate", "error", "words"), COLLATORS.values(), ids=COLLATORS)
def test_what_a_collator_of_ones_own_makes_is_looked_at_wherever_it_is_used(collate, error, words, tmp_path):
    def trainer(reference: str) -> WRPOTrainer:
        args = WRPOConfig(**settings(tmp_path, reference=reference, max_steps=1))
        rows = tiny_rows(4)
        return WRPOTrainer(tiny_model(), args, train_dataset=rows, eval_dataset=rows, data_collator=collate)

    uses = (lambda: trainer("copy").train(), lambda: trainer("none").evaluate(), lambda: trainer("precompute"))
    for use in uses:
        with pytest.raises(error, match=f"^data_collator: .*{words}"):
            use()


def test_a_collator_of_sft_needs_tokens_and_labels(tmp_path):
    args = SFTConfig(**settings(tmp_path, max_steps=1))
    trainer = SFTTrainer(tiny_model(), args, train_dataset=tiny_rows(4), data_collator=lambda rows: {"input_ids": rows})
    with pytest.raises(ValueError, match="expected tensors input_ids, labels, got none of input_ids, labels"):
        trainer.train()
