"""Every field of `transformers.TrainingArguments` works, is refused before training, or is documented as of no use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model, tiny_rows
from tiny_runs import training_lines, weights, wrpo_trainer
from transformers import TrainingArguments

from wrpo import SFTConfig, WRPOConfig, cli
from wrpo.training.config import FusedHeadConfig
from wrpo.training.inherited_fields import FIXED, OF_NO_USE

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
EVALUATION = {"eval_dataset": tiny_rows(2), "eval_strategy": "steps", "eval_steps": 1}
KEPT = {"save_strategy": "steps", "save_steps": 1}

# Each a run of two steps with other values than the defaults; together, with what is tested elsewhere, all that work.
RUNS: dict[str, dict[str, Any]] = {
    "optimizer": {"optim": "adagrad", "optim_args": "lr_decay=0.1", "weight_decay": 0.1, "max_grad_norm": None},
    "Adam": {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "learning_rate": 1e-3},
    "schedule": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-8}, "warmup_steps": 1},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "rewards/margins", **EVALUATION},
    "epochs": {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 3, "logging_strategy": "epoch"},
    "batches": {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 1, **EVALUATION},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "activations": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "noise": {"neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 1, "use_cache": True},
    "bfloat16": {"bf16": True, "tf32": False, "use_cpu": True, "logging_nan_inf_filter": True},
    "log": {"logging_first_step": True, "include_num_input_tokens_seen": "non_padding", "log_level": "info",
            "log_level_replica": "error", "log_on_each_node": False, "disable_tqdm": False, "logging_steps": 0.5},
    "report": {"report_to": "tensorboard", "run_name": "tiny", "project": "tiny", "trackio_space_id": "a",
               "trackio_bucket_id": "b", "trackio_static_space_id": "c"},
    "evaluation": {**EVALUATION, "eval_delay": 1, "eval_on_start": True},
    "best": {**EVALUATION, **KEPT, "load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies",
             "greater_is_better": True, "save_only_model": True, "save_total_limit": 1, "save_on_each_node": True},
    "signals": {"enable_jit_checkpoint": True, "restore_callback_states_from_checkpoint": True},
    "hub left alone": {"push_to_hub": False, "hub_token": "a", "hub_private_repo": True, "hub_model_id": "a/b",
                       "hub_strategy": "end", "hub_always_push": True, "hub_revision": "main"},
    "seeds": {"full_determinism": True, "seed": 3, "data_seed": 4},
    "accelerate": {"accelerator_config": {"even_batches": False, "non_blocking": True, "split_batches": True}},
    "loader": {"dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
               "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork",
               "dataloader_in_order": False, "dataloader_pin_memory": False},
    "several processes": {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 10, "ddp_broadcast_buffers": False,
                          "ddp_static_graph": True, "ddp_timeout": 100, "fsdp_config": {"min_num_params": 1}},
    "memory": {"debug": "underflow_overflow", "skip_memory_metrics": False},
    "order": {"train_sampling_strategy": "sequential"},
}  # fmt: skip
# By name, in tests with more to say: output_dir (all), resume_from_checkpoint (test_training_command), deepspeed and
# optim_target_modules (test_before_training), fsdp (test_ddp and docs), the rest in this file.
ELSEWHERE = (
    "output_dir", "resume_from_checkpoint", "deepspeed", "optim_target_modules", "fsdp", "fp16", "auto_find_batch_size",
    "ignore_data_skip", "torch_compile", "torch_compile_backend", "torch_compile_mode", "ddp_backend",
    "parallelism_config", "save_strategy", "save_steps", "max_steps",
)  # fmt: skip


@pytest.fixture(autouse=True)
def log_level():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


def known(settings: dict[str, Any]) -> dict[str, Any]:
    """What this release of transformers has."""
    return {name: value for name, value in settings.items() if name in FIELDS or name == "eval_dataset"}


def test_no_field_is_forgotten():
    works = {*(name for run in RUNS.values() for name in run), *ELSEWHERE} - {"eval_dataset"}
    assert set(FIELDS) <= works | FIXED.keys() | OF_NO_USE.keys()
    assert not works & (FIXED.keys() | OF_NO_USE.keys())
    assert not FIXED.keys() & OF_NO_USE.keys()


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_field_that_works_trains(settings, tmp_path):
    trainer = wrpo_trainer(tmp_path, **{"max_steps": 2, "learning_rate": 1e-2, **known(settings)})
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    if "eval_dataset" in settings:
        assert any("eval_loss" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("config_class", [WRPOConfig, SFTConfig])
@pytest.mark.parametrize("name", FIXED)
def test_a_field_that_would_be_ignored_is_refused_with_its_reason(name, config_class, tmp_path):
    value, reason = FIXED[name]
    other = {bool: not value, float: 0.5, list: ["loss"], type(None): {"rope": False}}[type(value)]
    if name not in FIELDS:
        pytest.skip("this transformers has no such field")
    config_class(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
        config_class(output_dir=str(tmp_path), use_cpu=True, **{name: other})
    assert reason in str(caught.value)


def test_fields_of_no_use_change_nothing(tmp_path):
    values = {
        "prediction_loss_only": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
        "eval_accumulation_steps": 1, "label_names": ["labels"], "length_column_name": "tokens", "do_train": True,
        "do_eval": True, "do_predict": True, "local_rank": 0,
    }  # fmt: skip
    assert values.keys() == OF_NO_USE.keys()
    runs = [
        wrpo_trainer(tmp_path, max_steps=2, learning_rate=1e-2, **EVALUATION, **settings)
        for settings in ({}, known(values))
    ]
    for trainer in runs:
        trainer.train()
    first, second = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    timeless = [
        [{k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in run.state.log_history]
        for run in runs
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_sampling_strategy": "shortest"}, "train_sampling_strategy: expected one of random, sequential, "),
        ({"log_level": "loud"}, "log_level: expected one of "),
        ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen: expected one of all, "),
        ({"save_steps": 0}, "save_steps: expected a finite number > 0, got 0"),
        ({"logging_steps": -1}, "logging_steps: expected a finite number > 0, got -1"),
        ({"eval_steps": -1}, "eval_steps: expected a finite number >= 0, got -1"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps: expected a whole number >= 1, got 0"),
        ({"max_steps": 1.5}, "max_steps: expected a whole number >= -1, got 1.5"),
        ({"neftune_noise_alpha": float("nan")}, "neftune_noise_alpha: expected a finite number >= 0, got nan"),
        ({"learning_rate": None}, "learning_rate: expected a finite number, got none"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor: expected a "),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs dataloader_num_workers above 0"),
        ({"dataloader_multiprocessing_context": "fork"}, "needs dataloader_num_workers above 0"),
        ({"optim_target_modules": ["q_proj"]}, "is for the optimizers galore, apollo and their like"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must be false"),
        ({"ddp_backend": "gloo"}, "ddp_backend is for several processes"),
        ({"parallelism_config": "cp"}, "parallelism_config: expected accelerate's ParallelismConfig"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"tf32": True}, "tf32"),
    ],
)
def test_values_that_no_run_could_use_are_refused_at_once(settings, words, tmp_path):
    if not settings.keys() <= FIELDS.keys():
        pytest.skip("this transformers has no such field")
    if "tf32" in settings and torch.cuda.is_available():
        pytest.skip("this machine has TF32")
    with pytest.raises(ValueError, match=[*settings][-1]) as caught:
        FusedHeadConfig(output_dir=str(tmp_path), **{"use_cpu": True, **settings})
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_what_cuts_a_response_into_parts_is_refused_in_the_settings_and_from_the_launcher(name, tmp_path, monkeypatch):
    config = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, name: 2})
    with pytest.raises(
        ValueError, match=f"^parallelism_config: {name} must be 1, got 2: (context|sequence) parallelism"
    ):
        FusedHeadConfig(output_dir=str(tmp_path), use_cpu=True, parallelism_config=config)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ValueError, match=f"^parallelism_config: {name} must be 1, got 2"):
        FusedHeadConfig(output_dir=str(tmp_path), use_cpu=True)


def test_a_batch_that_does_not_fit_is_halved_and_trains_the_same(tmp_path, monkeypatch):
    """`auto_find_batch_size`: what a first try has added to the running means would show in the log."""
    exact = {"beta": 1.0, "optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0,
             "gradient_accumulation_steps": 2}  # fmt: skip
    small = wrpo_trainer(tmp_path, **exact, per_device_train_batch_size=1)
    small.train()
    large = wrpo_trainer(tmp_path, **exact, per_device_train_batch_size=2, auto_find_batch_size=True)
    forward, seen = large.forward_loss, []

    def of_one_row(model, batch, *rest):
        seen.append(len(batch["num_responses"]))
        if len(seen) == 2 and seen[-1] > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(model, batch, *rest)

    monkeypatch.setattr(large, "forward_loss", of_one_row)
    large.train()
    assert seen[:3] == [2, 2, 1]
    timeless = [
        [{k: v for k, v in line.items() if k != "grad_norm"} for line in training_lines(run)] for run in (small, large)
    ]
    assert timeless[1] == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in timeless[0]]


def test_a_compiled_model_trains_the_same(tmp_path):
    settings = {"rows": tiny_rows(2), "max_steps": 1, "beta": 1.0, "optim": "sgd", "learning_rate": 0.1}
    runs = [
        wrpo_trainer(tmp_path, tiny_model(num_hidden_layers=1), **settings, warmup_steps=0, **compiled)
        for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"})
    ]
    for trainer in runs:
        trainer.train()
    first, second = map(weights, runs)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6, msg=name)


def test_help_lists_what_is_refused_and_what_is_of_no_use(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sft", "--help"])
    shown = capsys.readouterr().out
    for name, (_, reason) in FIXED.items():
        assert f"{name} other than" in shown
        assert reason in shown
    assert all(f"  {name}: {reason}" in shown for name, reason in OF_NO_USE.items())


def test_metrics_of_a_run_that_diverged_are_json(tmp_path):
    trainer = wrpo_trainer(tmp_path, max_steps=2)
    trainer.state.log_history = [{"loss": float("nan"), "step": 1}, {"grad_norm": float("inf"), "step": 2}]
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "TrainingCurves")
    callback.on_train_end(trainer.args, trainer.state, trainer.control)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = Path(tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=refuse)["log_history"] == [
        {"loss": None, "step": 1},
        {"grad_norm": None, "step": 2},
    ]
