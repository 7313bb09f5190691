"""A mistyped name is answered with the one that was meant, and with none where none is near."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest

from wrpo import WRPOConfig
from wrpo.settings import DataSettings, ModelSettings
from wrpo.spelling import distance, nearest

# What people type at `wrpo train`, and what they mean; None: it has no such setting, or several.
MEANT = {
    "learning_rat": "learning_rate",
    "lerning_rate": "learning_rate",
    "bta": "beta",
    "aplha": "alpha",
    "train_fil": "train_file",
    "outputdir": "output_dir",
    "output": "output_dir",
    "max_lenght": "max_length",
    "max_prompt": "max_prompt_length",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "optimizer": "optim",
    "gradient_accumulation": "gradient_accumulation_steps",
    "losstype": "loss_type",
    "lenght_normalise": "length_normalize",
    "reference_model": "reference",
    "fdsp": "fsdp",
    "load_in_4bit": None,
    "use_peft": None,
    "packing": None,
    "lr": None,
    "warmup_ratio": None,
    "peft_config": None,
    "dataset": None,
    "qqqq": None,
}


@cache
def names() -> tuple[str, ...]:
    return tuple(field.name for cls in (ModelSettings, DataSettings, WRPOConfig) for field in dataclasses.fields(cls))


@pytest.mark.parametrize("typed", MEANT)
def test_a_mistyped_setting_is_answered_with_the_one_that_was_meant(typed):
    assert nearest(typed, names()) == MEANT[typed]


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("", "", 0), ("beta", "beta", 0), ("bta", "beta", 1), ("betta", "beta", 1), ("beat", "beta", 1), ("", "abc", 3),
     ("gamma", "alpha", 4), ("kitten", "sitting", 3)],
)  # fmt: skip
def test_letters_added_dropped_changed_or_swapped_count_one_each(one, other, edits):
    assert distance(one, other) == distance(other, one) == edits
