"""A setting that has few values: they are listed for the reader, and any other is refused wherever it comes from."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

import wrpo.training.command
from wrpo import WRPOConfig, cli
from wrpo.sampling.sources import KINDS
from wrpo.scoring.judge import JudgeSource
from wrpo.settings import DataSettings, SettingsError, choices_of
from wrpo.settings.parser import Parser
from wrpo.training.loss_names import LossName

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
COMMANDS = runpy.run_path(str(DOCS / "generate.py"))["COMMANDS"]
CLASSES = dict.fromkeys([cls for classes in COMMANDS.values() for cls in classes] + [*KINDS.values(), JudgeSource])
WITH_CHOICES = [
    (cls, field)
    for cls in CLASSES
    for field in dataclasses.fields(cls)
    if choices_of(get_type_hints(cls)[field.name]) and field.metadata.get("help")
]


def named(value: object) -> str | None:
    return getattr(value, "__name__", None) or getattr(value, "name", None)


def is_list(hint: object) -> bool:
    return any(get_origin(part) is list for part in (hint, *get_args(hint)))


def test_every_setting_of_a_preference_loss_that_has_few_values_says_so():
    names = {field.name for cls, field in WITH_CHOICES if cls.__name__ == "DPOConfig"}
    assert names >= {"loss_type", "alpha_schedule", "source_weighting", "reference", "reference_fusion"}


@pytest.mark.parametrize(("cls", "field"), WITH_CHOICES, ids=named)
def test_a_value_that_is_none_of_the_choices_is_refused_in_python_too(cls, field):
    hints = get_type_hints(cls)
    values = {
        other.name: ["x"] if is_list(hints[other.name]) else "x"
        for other in dataclasses.fields(cls)
        if other.default is other.default_factory is dataclasses.MISSING
    }
    values[field.name] = ["sideways"] if is_list(hints[field.name]) else "sideways"
    choices = ", ".join(choices_of(hints[field.name]))
    with pytest.raises(ValueError, match=f"^{field.name}: expected one of {choices}, got 'sideways'"):
        cls(**values)


def test_a_setting_that_is_a_choice_or_a_list_of_them_has_each_once():
    assert choices_of(get_type_hints(WRPOConfig)["loss_type"]) == get_args(LossName)


def test_help_and_the_page_of_settings_list_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--help"])
    assert "--loss_type {sigmoid,hinge,ipo,simpo,dpo,robust," in capsys.readouterr().out
    assert "Choices: `sigmoid`, `hinge`, `ipo`, `simpo`, `dpo`, `robust`, " in (DOCS / "settings.md").read_text()


BOOLS = [name for name, reading in Parser((DataSettings, WRPOConfig), "wrpo train").readings.items() if reading.is_bool]


@pytest.mark.parametrize("name", BOOLS)
def test_a_bool_that_is_none_names_the_flag_what_was_expected_and_what_came(name):
    for value, arguments in {
        "maybe": [f"--{name}", "maybe", "t.jsonl"],
        "2": ["t.jsonl", f"--{name}=2"],
        "yess": ["t.jsonl", f"--{name}", "yess"],
    }.items():
        with pytest.raises(SettingsError, match=f"^{name}: expected true or false, got '{value}'"):
            wrpo.training.command.parse("train", WRPOConfig, [*arguments, "--model_name_or_path", "m"])


def test_the_word_behind_a_bool_may_be_a_file_without_a_dot_and_none_leaves_it_unset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    for flags, skips in ((["--skip_bad_rows", "rows"], True), (["rows", "--skip_bad_rows", "no"], False)):
        _, data, config = wrpo.training.command.parse(
            "train", WRPOConfig, [*flags, "--tf32", "none", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
        )
        assert (data.train_file, data.skip_bad_rows, config.tf32) == ("rows", skips, None)


CHOOSING = {
    "loss_type": "sigmoid, hinge", "torch_dtype": "float32, bfloat16", "lr_scheduler_type": "linear, cosine",
    "save_strategy": "no, steps", "log_level": "detail, debug", "train_sampling_strategy": "random, sequential",
    "debug": "underflow_overflow", "ddp_backend": "nccl, gloo", "optim": "adamw_torch, ", "reference": "auto, copy",
}  # fmt: skip


@pytest.mark.parametrize(("name", "choices"), CHOOSING.items())
@pytest.mark.parametrize("where", ["flag", "file"])
def test_a_choice_that_there_is_not_names_the_field_its_choices_and_what_came(name, choices, where, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{name}: sideways" if where == "file" else "beta: 1")
    flags = [] if where == "file" else [f"--{name}", "sideways"]
    with pytest.raises(SettingsError, match=rf"{name}: expected one of {choices}.*, got 'sideways'$"):
        wrpo.training.command.parse(
            "train", WRPOConfig, [str(tmp_path / "c.yaml"), "t.jsonl", "--model_name_or_path", "m", *flags]
        )
