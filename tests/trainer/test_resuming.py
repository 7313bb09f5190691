"""A run that goes on from a checkpoint is the run that made it, says what is different, or is refused."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model, tiny_rows
from tiny_runs import SETTINGS, training_lines, wrpo_trainer

from wrpo import DPOConfig, SFTConfig, SFTTrainer, WRPOTrainer
from wrpo.data.fingerprint import data_fingerprint
from wrpo.training.run_record import FILE, compare
from wrpo.user_error import UserError

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1, "warmup_steps": 0}


def adapted(r: int = 2, init: int = 0, seed: int = 0, targets: str = "q_proj"):
    model = tiny_model(seed=seed)
    torch.manual_seed(init)
    return get_peft_model(model, LoraConfig(target_modules=[targets], r=r))


def run(folder: Path, model=None, **settings) -> WRPOTrainer:
    return wrpo_trainer(folder, model, **{**EVERY_STEP, **settings})


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """Of one step of the tiny Llama, with AdamW."""
    run(tmp_path, max_steps=1).train()
    return str(tmp_path / "checkpoint-1")


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "wrpo.training"]


def test_a_run_that_goes_on_as_it_began_says_nothing(checkpoint, said, tmp_path):
    run(tmp_path / "whole", max_steps=3).train()
    trainer = run(tmp_path / "again", max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # of a model trained since
    assert said() == []


def test_a_second_run_of_one_trainer_keeps_its_own_settings_and_the_model_of_the_first(tmp_path):
    trainer = run(tmp_path, max_steps=1)
    records = []
    for beta in (0.5, 0.7):
        trainer.args.beta = beta
        trainer.train()
        records.append(json.loads((tmp_path / "checkpoint-1" / FILE).read_text()))
    assert [record["beta"] for record in records] == [0.5, 0.7]
    assert records[0] | {"beta": 0.7} == records[1]


def test_a_run_that_is_at_its_end_says_so(checkpoint, said, tmp_path):
    run(tmp_path, max_steps=1).train(resume_from_checkpoint=checkpoint)
    assert said() == ["Nothing is left to train: the checkpoint is at step 1 of 1"]


def test_what_makes_another_loss_or_another_order_of_the_data_is_one_line_with_then_and_now(checkpoint, said, tmp_path):
    changes = {"beta": 0.5, "loss_type": "ipo", "alpha": 0.7, "max_steps": 2, "learning_rate": 1e-5, "seed": 7}
    trainer = run(tmp_path, rows=tiny_rows(9), **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    stays, line = said()
    assert stays == f"{checkpoint} goes on with what its optimizer's state holds: learning_rate 3e-07, not 1e-05"
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 3e-7
    assert line.startswith(f"{checkpoint} goes on otherwise than it began: ")
    for part in ("beta: 0.01 -> 0.5", "loss_type: sigmoid -> ipo", "alpha: 0.1 -> 0.7", "max_steps: 1 -> 2",
                 "seed: 42 -> 7", "data: 8 rows, "):  # fmt: skip
        assert part in line
    assert "logging" not in line and "learning_rate" not in line
    assert trainer.state.global_step == 2


def test_another_reference_is_said(checkpoint, said, tmp_path):
    run(tmp_path, max_steps=2, ref_model=tiny_model(seed=3)).train(resume_from_checkpoint=checkpoint)
    run(tmp_path, max_steps=2, reference="none").train(resume_from_checkpoint=checkpoint)
    with_other, without = said()
    assert "ref_model: null -> " in with_other
    assert "reference_source: copy -> none" in without


def test_what_a_row_weighs_and_the_order_of_rows_are_of_the_data():
    rows = tiny_rows(4)
    heavier = [{**rows[0], "share": [1.0, 1.0, 0.5]}, *rows[1:]]
    for form in (list, datasets.Dataset.from_list):
        prints = [data_fingerprint(form(part)) for part in (rows, rows[::-1], heavier, rows[:3])]
        assert len(set(prints)) == 4
        assert data_fingerprint(form(tiny_rows(4))) == prints[0]
    table = datasets.Dataset.from_list(rows)
    assert data_fingerprint(table.select([0, 1, 2, 3])) == data_fingerprint(table)
    assert data_fingerprint(table.select([3, 2, 1, 0])) == data_fingerprint(datasets.Dataset.from_list(rows[::-1]))


def test_a_list_and_a_dataset_of_the_same_rows_are_the_same_data(monkeypatch):
    monkeypatch.setattr("wrpo.data.fingerprint.ROWS_AT_A_TIME", 3)
    monkeypatch.setattr("wrpo.data.lengths.ROWS_AT_A_TIME", 3)
    rows = tiny_rows(8)
    for row in rows[::3]:
        row["reward"] = [1, 0.5, None][: len(row["role"])]
    expected = data_fingerprint(rows)
    assert data_fingerprint(datasets.Dataset.from_list([{"reward": None, **row} for row in rows])) == expected
    tensors = {"prompt_ids": torch.tensor, "response_ids": lambda responses: [np.array(ids) for ids in responses]}
    arrays = [row | {name: make(row[name]) for name, make in tensors.items()} for row in rows]
    assert data_fingerprint(arrays) == expected
    rows[1]["response_ids"] = [[*ids, 3] for ids in rows[1]["response_ids"]]
    assert data_fingerprint(rows) != expected


def test_a_field_that_only_one_of_the_records_has_is_said_and_equal_values_are_not(said):
    kept = {"adapter.r": 8, "config.rope_scaling": {"a": 1, "b": 2}, "gamma": math.nan, "gone": None, "beta": 1}
    compare(kept, {"gamma": math.nan, "config.rope_scaling": {"b": 2, "a": 1}, "beta": 2, "new": [3]}, "here")
    assert said() == ["here goes on otherwise than it began: adapter.r: 8 -> null, beta: 1 -> 2, new: null -> [3]"]


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (
            {},
            {"model": lambda: tiny_model(seed=1)},
            "of another run: model .* Go on with the model, in the torch_dtype",
        ),
        ({"sync_ref_model": True}, {}, "of another run: sync_ref_model true then, false now. Leave it as it was"),
        ({}, {"optim": "sgd"}, "of another run: optimizer torch.optim.adamw.AdamW then, torch.optim.sgd.SGD now"),
        ({}, {"optim": "adafactor"}, "optimizer .* Go on with the optimizer that it was made with"),
        ({}, {"model": adapted}, "of another run: trained .* Train the same parameters"),
        ({"model": adapted}, {"model": lambda: adapted(r=3)}, "of another run: trained"),
        ({"model": adapted}, {"model": lambda: adapted(targets="k_proj")}, "of another run: trained"),
        ({"model": adapted}, {"model": lambda: adapted(seed=1)}, "of another run: model"),
    ],
    ids=[
        "model",
        "a reference that moved",
        "sgd",
        "adafactor",
        "an adapter",
        "its size",
        "its place",
        "the model below it",
    ],
)
def test_state_of_another_model_or_optimizer_is_refused_before_training(then, now, words, tmp_path):
    def trainer(settings: dict) -> WRPOTrainer:
        return run(tmp_path, **{name: value() if callable(value) else value for name, value in settings.items()})

    trainer({"max_steps": 1, **then}).train()
    later = trainer({"max_steps": 2, **now})
    before = {name: value.clone() for name, value in later.model.state_dict().items()}
    with pytest.raises(UserError, match=f"^resume_from_checkpoint: .*checkpoint-1 is {words}|{words}") as caught:
        later.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in later.model.state_dict().items())


@pytest.mark.parametrize("command", ["dpo", "sft"])
def test_state_of_another_command_is_refused(command, checkpoint, tmp_path):
    kind, config = (SFTTrainer, SFTConfig) if command == "sft" else (WRPOTrainer, DPOConfig)
    later = kind(tiny_model(), config(output_dir=str(tmp_path / "b"), **SETTINGS), train_dataset=tiny_rows())
    with pytest.raises(ValueError, match=f"settings WRPOConfig then, {config.__name__} now. Go on with the command"):
        later.train(resume_from_checkpoint=checkpoint)


def test_a_fresh_adapter_is_the_same_whatever_numbers_it_was_drawn_with(said, tmp_path):
    run(tmp_path, adapted(init=1), reference="adapter", max_steps=2).train()
    first = str(tmp_path / "checkpoint-1")
    run(tmp_path, adapted(init=2), reference="adapter", max_steps=2).train(resume_from_checkpoint=first)
    assert said() == []
    other = adapted(init=2)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    run(tmp_path, other, reference="precompute", max_steps=2).train(resume_from_checkpoint=first)
    assert "adapter: fresh -> " in said()[-1]


def test_a_checkpoint_of_an_earlier_release_goes_on_with_a_remark(checkpoint, said, tmp_path):
    (Path(checkpoint) / FILE).unlink()
    trainer = run(tmp_path, max_steps=2, beta=0.5)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert said() == [f"{checkpoint} has no {FILE}: whether the settings of its run are those of this one is not known"]
    assert [line["step"] for line in training_lines(trainer)] == [1, 2]


@pytest.mark.parametrize(
    ("optim", "lacking"), [("sgd", "momentum, dampening"), ("adafactor", "clip_threshold, decay_rate")]
)
def test_there_the_state_itself_tells_another_optimizer(optim, lacking, checkpoint, tmp_path):
    (Path(checkpoint) / FILE).unlink()
    with pytest.raises(UserError, match=f"state of another optimizer than optim '{optim}', .*: no {lacking}"):
        run(tmp_path, max_steps=2, optim=optim).train(resume_from_checkpoint=checkpoint)


def test_the_record_is_json_that_one_process_writes_and_transformers_does_not_mind(checkpoint, tmp_path):
    record = json.loads((Path(checkpoint) / FILE).read_text())
    assert (record["settings"], record["beta"], record["config.hidden_size"]) == ("WRPOConfig", 0.01, 32)
    type(tiny_model()).from_pretrained(checkpoint)


def test_the_setting_counts_where_train_is_called_without_an_argument(checkpoint, tmp_path):
    trainer = run(tmp_path / "b", max_steps=2, resume_from_checkpoint=checkpoint)
    trainer.train()
    assert [line["step"] for line in training_lines(trainer)] == [1, 2]
    with pytest.raises(UserError, match="resume_from_checkpoint: no checkpoint at nowhere"):
        run(tmp_path / "b", resume_from_checkpoint="nowhere").train()
