"""A setting that has few values: they are listed for the reader, and any other is refused wherever it comes from."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from wrpo import cli
from wrpo.sampling.sources import KINDS
from wrpo.scoring.judge import JudgeSource
from wrpo.settings import choices_of

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


def test_help_and_the_page_of_settings_list_the_choices(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--help"])
    assert "--loss_type {sigmoid,hinge,ipo,simpo,dpo,robust," in capsys.readouterr().out
    assert "Choices: `sigmoid`, `hinge`, `ipo`, `simpo`, `dpo`, `robust`, " in (DOCS / "settings.md").read_text()
