"""alpha rises as the paper's does, and a step's alpha depends on the step alone; bad settings are named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from transformers import TrainingArguments

from wrpo import SFTConfig, WRPOConfig
from wrpo.settings import DataSettings, ModelSettings, parse_settings
from wrpo.training.schedule import alpha_at

PAPER = {"schedule": "linear", "start": 0.0, "end": 0.1, "warmup_ratio": 1.0}


@pytest.mark.parametrize(("done", "alpha"), [(0, 0.0), (1, 0.025), (2, 0.05), (3, 0.075), (4, 0.1), (5, 0.1)])
def test_the_papers_schedule_is_linear_from_zero_to_alpha_over_all_steps(done, alpha):
    assert alpha_at(done / 4, **PAPER) == pytest.approx(alpha, rel=1e-15)


@pytest.mark.parametrize(
    ("schedule", "progress", "alpha"),
    [
        ("linear", 0.25, 0.35),  # half of the warm-up
        ("cosine", 0.25, 0.35),
        ("cosine", 0.125, 0.2 + 0.3 * (1 - math.sqrt(0.5)) / 2),
        ("linear", 0.5, 0.5),
        ("cosine", 0.9, 0.5),
        ("constant", 0.0, 0.5),
    ],
)
def test_alpha_by_hand_from_two_to_five_tenths_over_the_first_half(schedule, progress, alpha):
    assert alpha_at(progress, schedule=schedule, start=0.2, end=0.5, warmup_ratio=0.5) == pytest.approx(
        alpha, rel=1e-15
    )


def test_without_a_warmup_alpha_is_at_its_end_from_the_first_step():
    assert alpha_at(0.0, schedule="linear", start=0.0, end=0.3, warmup_ratio=0.0) == 0.3


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="schedule must be one of"):
        alpha_at(0.5, **{**PAPER, "schedule": "step"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.5),
        ("alpha_start", -0.1),
        ("alpha_warmup_ratio", 2),
        ("alpha_schedule", "step"),
        ("beta", 0.0),
        ("gamma", math.nan),
        ("nll_weight", -1.0),
        ("loss_type", "dpo2"),
        ("loss_label_smoothing", 0.5),
        ("reference", "cache"),
        ("empty_response", "skip"),
        ("source_weighting", "model"),
        ("source_temperature", 0.0),
        ("performance_decay", 1.0),
        ("alpha_goal_accuracy", 0.5),
        ("reference_fusion", "max"),
        ("max_length", 1),
        ("max_prompt_length", 0),
        ("budget_bytes", 0),
        ("remove_unused_columns", True),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_a_bad_value_raises_and_names_the_field(field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        WRPOConfig(output_dir=tmp_path, **{field: value})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss_type": "simpo", "reference": "copy"}, "reference must be none"),
        ({"loss_type": "hinge", "loss_label_smoothing": 0.1}, "loss_label_smoothing belongs to"),
        ({"loss_type": "exo_pair"}, "loss_label_smoothing must be > 0 for loss_type 'exo_pair'.*0.001"),
        ({"loss_type": ["sigmoid", "simpo"]}, "'simpo'.* stands alone"),
        ({"loss_type": []}, "loss_type must name a loss"),
        ({"loss_type": "bco_pair", "gamma": 0.5}, "gamma belongs to a margin, .*'bco_pair'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"loss_weights must be 2 numbers.*got \[1.0\]"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, "'forward_kl' belongs to .*'bco_pair'"),
        ({"f_divergence_type": "forward_kl", "reference": "none"}, "'forward_kl' bends .* reference 'none'"),
        ({"loss_type": "orpo", "reference": "precompute"}, "reference must be none"),
        ({"alpha_schedule": "adaptive", "alpha_warmup_ratio": 0.5}, "alpha_warmup_ratio .* alpha_schedule 'adaptive'"),
        (
            {"alpha_schedule": "adaptive", "loss_type": "dpo"},
            "alpha_schedule 'adaptive' would change nothing",
        ),
        (
            {"source_weighting": "margin", "loss_type": "dpo"},
            "source_weighting 'margin' would change nothing",
        ),
        ({"reference_fusion": "average"}, "reference_fusion .* length_normalize"),
        (
            {"reference_fusion": "average", "length_normalize": True, "reference": "none"},
            "reference_fusion .* reference 'none'",
        ),
        (
            {"reference_fusion": "average", "length_normalize": True, "loss_type": "simpo"},
            "reference_fusion .* loss_type 'simpo'",
        ),
    ],
)
def test_fields_that_contradict_each_other_raise(fields, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        WRPOConfig(output_dir=tmp_path, **fields)


@pytest.mark.parametrize("config", [WRPOConfig, SFTConfig])
def test_every_knob_says_what_it_means_and_its_default(config):
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(config):
        if field.name not in inherited or field.name in config.__annotations__:
            assert "Default" in field.metadata.get("help", ""), f"{field.name} does not name its default"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("wrpo.yaml", {"loss_type": "sigmoid", "alpha": 0.1, "beta": 0.01, "source_weighting": "rows"}),
        ("wrpo_ipo.yaml", {"loss_type": "ipo", "alpha": 0.1, "beta": 0.01, "learning_rate": 1e-6}),
        ("wrpo_simpo.yaml", {"loss_type": "simpo", "alpha": 0.5, "beta": 10, "gamma": 0, "learning_rate": 6e-7}),
        ("wrpo_adaptive.yaml", {"alpha_schedule": "adaptive", "source_weighting": "margin"}),
    ],
)
def test_the_examples_are_settings_of_the_paper_and_of_what_adapts(name, settings):
    example = str(Path(__file__).parent.parent.parent / "examples" / name)
    *_, config = parse_settings((ModelSettings, DataSettings, WRPOConfig), [example], "wrpo train")
    assert {field: getattr(config, field) for field in settings} == settings


def test_the_defaults_are_the_papers(tmp_path):
    config = WRPOConfig(output_dir=tmp_path)
    assert (config.alpha, config.beta, config.alpha_schedule) == (0.1, 0.01, "linear")
    assert (config.learning_rate, config.warmup_steps, config.num_train_epochs, config.seed) == (3e-7, 0.1, 1, 42)
    assert config.lr_scheduler_type == "cosine"
    assert (config.max_length, config.max_prompt_length) == (2048, 1800)
    assert SFTConfig(output_dir=tmp_path).learning_rate == 7e-6
