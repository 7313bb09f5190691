"""Runs in the three layouts log the same history, and a resumed one the same bits."""

from __future__ import annotations

import re

import pytest
import torch
from layout_models import attending_model
from peft import LoraConfig, get_peft_model
from tiny_models import sft_batch, tiny_model, tiny_rows
from tiny_runs import SETTINGS, training_lines, weights, wrpo_trainer

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer
from wrpo.data import PreferenceCollator
from wrpo.data.layout import Layout
from wrpo.training.layout_trainer import LayoutTrainer

# Rates that change the tiny model within a few steps; the reference is in float32, as all the rest.
RUN = {"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0, "beta": 0.5, "optim": "sgd"}
KINDS = {
    "copy": {"reference": "copy"},
    "precompute": {"reference": "precompute"},
    "adapter": {"reference": "adapter", "gradient_checkpointing": True},
    "reference-free": {"reference": "none", "loss_type": "simpo"},
    "checkpointing": {"reference": "copy", "gradient_checkpointing": True},
    "checkpointing-reentrant": {
        "reference": "copy", "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "length-normalised": {"reference": "copy", "length_normalize": True, "nll_weight": 0.1},
    "empty": {"reference": "copy", "empty_response": "zero"},
    "adaptive": {"reference": "copy", "alpha_schedule": "adaptive", "source_weighting": "margin"},
    "accumulated": {"reference": "copy", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}  # fmt: skip


def rows_for(kind: str) -> list[dict]:
    rows = tiny_rows(8, sources=2)
    if kind == "empty":
        rows[2]["response_ids"][1] = []
    return [row | {"model": ["a", "b", None, None]} for row in rows]


def history(kind: str, layout: str, folder) -> tuple[list[dict], dict[str, torch.Tensor], dict]:
    model = tiny_model()
    if kind == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    settings = {**RUN, **KINDS[kind], "layout": layout}
    trainer = wrpo_trainer(folder / layout, model, rows_for(kind), eval_dataset=tiny_rows(3, sources=2), **settings)
    assert trainer.layout_choice.layout.name == layout
    trainer.train()
    evaluated = {
        name: value for name, value in trainer.evaluate().items() if "second" not in name and "time" not in name
    }
    return training_lines(trainer), weights(trainer), evaluated


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_logs_the_same_in_every_layout(kind, tmp_path):
    lines, ends, evaluated = history(kind, "padded", tmp_path)
    assert lines[-1]["loss"] != lines[0]["loss"]
    for layout in ("packed", "shared"):
        own_lines, own_ends, own_evaluated = history(kind, layout, tmp_path)
        assert len(own_lines) == len(lines) == RUN["max_steps"]
        # Log-probs of 9 tokens a response, rounded to float32, times beta and the steps before.
        for number, (own, line) in enumerate(zip(own_lines, lines, strict=True)):
            if not number:  # policy and reference are the same model: rounding decides who wins
                own, line = ({k: v for k, v in of.items() if "accuracies" not in k} for of in (own, line))
            assert own == pytest.approx(line, rel=1e-4, abs=1e-4)
        assert own_evaluated == pytest.approx(evaluated, rel=1e-4, abs=1e-4)
        for name, value in ends.items():
            torch.testing.assert_close(own_ends[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_fine_tuning_logs_the_same_packed_and_padded(tmp_path):
    lines = {}
    for layout in ("padded", "packed"):
        args = SFTConfig(output_dir=str(tmp_path / layout), layout=layout, max_steps=3, learning_rate=1e-2, **SETTINGS)
        trainer = SFTTrainer(tiny_model(), args, train_dataset=tiny_rows(), eval_dataset=tiny_rows(3, seed=1))
        trainer.train()
        lines[layout] = [line["loss"] for line in training_lines(trainer)] + [trainer.evaluate()["eval_loss"]]
    assert lines["packed"] == pytest.approx(lines["padded"], rel=1e-5)
    assert lines["packed"][0] != lines["packed"][-1]


def test_fine_tuning_has_no_prompt_to_share(tmp_path):
    with pytest.raises(ValueError, match=r"layout 'shared' would change nothing: .* use packed"):
        SFTConfig(output_dir=str(tmp_path), layout="shared", **SETTINGS)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_resumed_run_ends_at_the_same_bits(layout, tmp_path):
    settings = {**RUN, "optim": "adamw_torch", "layout": layout, "save_strategy": "steps", "save_steps": 2}
    whole = wrpo_trainer(tmp_path, **settings)
    whole.train()
    resumed = wrpo_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weights(resumed)[name], value) for name, value in weights(whole).items())
    assert training_lines(resumed)[-1]["loss"] == training_lines(whole)[-1]["loss"]


def test_a_run_says_its_layout_and_why(tmp_path, capsys):
    wrpo_trainer(tmp_path, max_steps=1).train()
    assert re.search(
        r"^layout     shared, 0\.[56]\d of the operations of padded rows$", capsys.readouterr().err, re.MULTILINE
    )


def test_a_model_that_takes_no_mask_trains_padded_and_is_refused_by_name(tmp_path):
    assert wrpo_trainer(tmp_path, attending_model("mamba")).layout_choice.layout.name == "padded"
    with pytest.raises(ValueError, match="layout 'shared': shared rows do not go through MambaForCausalLM"):
        wrpo_trainer(tmp_path, attending_model("mamba"), layout="shared")


def test_a_reference_that_takes_no_mask_decides_for_both(tmp_path):
    trainer = wrpo_trainer(tmp_path, ref_model=attending_model("mamba"))
    assert trainer.layout_choice.layout.name == trainer.data_collator.layout.name == "padded"
    assert trainer.layout_choice.reason.startswith("reference: shared rows do not go")
    with pytest.raises(ValueError, match="layout 'packed': reference: packed rows do not go"):
        wrpo_trainer(tmp_path, ref_model=attending_model("mamba"), layout="packed")


def test_a_reference_with_another_attention_finds_the_form_that_both_take(tmp_path):
    eager = attending_model("llama", attn_implementation="eager")
    trainer = wrpo_trainer(tmp_path, attending_model("llama"), ref_model=eager)
    assert trainer.layout_choice.layout == trainer.data_collator.layout == Layout("shared", "mask")


def test_without_the_check_of_the_head_a_name_is_believed_and_auto_is_padded(tmp_path):
    reason = wrpo_trainer(tmp_path, check_head=False).layout_choice.reason
    assert reason == "another layout would save work, but check_head is off; name it, and it is believed"
    trainer = wrpo_trainer(tmp_path, attending_model("mamba"), check_head=False, layout="shared")
    assert trainer.data_collator.layout.name == "shared"


def test_a_collator_of_ones_own_keeps_its_rows(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=tiny_rows(), data_collator=sft_batch)
    assert str(trainer.layout_choice) == "padded, as data_collator makes it"
    args = SFTConfig(output_dir=str(tmp_path), layout="packed", **SETTINGS)
    with pytest.raises(ValueError, match=r"layout 'packed' is the work of .* use layout auto or padded"):
        SFTTrainer(tiny_model(), args, train_dataset=tiny_rows(), data_collator=sft_batch)


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout: expected one of auto, padded, packed, shared, got 'Shared'"):
        WRPOConfig(output_dir=str(tmp_path), layout="Shared")


def test_rows_that_cannot_be_used_are_the_error_of_the_rows_not_of_the_model(tmp_path):
    rows = tiny_rows()
    rows[0] |= {"prompt_ids": [3] * 20, "response_ids": [[4], [], [5]]}  # the longest row, so it is looked at
    with pytest.raises(ValueError, match="a response with a token to count"):
        wrpo_trainer(tmp_path, rows=rows)


def test_an_evaluation_without_training_data_goes_by_its_own_rows(tmp_path):
    args = WRPOConfig(output_dir=str(tmp_path), reference="copy", **SETTINGS)
    trainer = WRPOTrainer(tiny_model(), args, eval_dataset=tiny_rows())
    assert trainer.layout_choice.layout.name == "shared"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    nothing = WRPOTrainer(tiny_model(), args)
    assert str(nothing.layout_choice) == "padded, there are no rows to look at"


def test_a_model_that_cannot_run_yet_is_asked_when_it_is_wrapped(tmp_path, monkeypatch):
    """As under ZeRO-3, which empties the weights, and FSDP, which brings them to the device."""
    at_once = wrpo_trainer(tmp_path / "at once", max_steps=3)
    monkeypatch.setattr(LayoutTrainer, "can_be_asked", lambda self, model: False)
    later = wrpo_trainer(tmp_path / "later", max_steps=3)
    assert later.layout_choice.layout.name == "padded"
    at_once.train()
    later.train()
    assert later.layout_choice == at_once.layout_choice and later.data_collator.layout.name == "shared"
    assert training_lines(later) == training_lines(at_once)
    with pytest.raises(ValueError, match="layout 'shared': shared rows do not go through Mamba"):
        wrpo_trainer(tmp_path / "mamba", attending_model("mamba"), layout="shared").train()


def test_the_layout_of_the_callers_collator_holds_and_the_collator_stays_his(tmp_path):
    class Own(PreferenceCollator):
        def __init__(self):
            super().__init__(0, layout=Layout("packed"))
            self.seen = 0

        def __call__(self, rows):
            self.seen += 1
            return super().__call__(rows)

    own = Own()
    trainer = wrpo_trainer(tmp_path, data_collator=own)
    assert trainer.data_collator.layout.name == "packed" and own.layout == Layout("packed")
    assert isinstance(trainer.data_collator, Own)
    settled = PreferenceCollator(0)
    assert wrpo_trainer(tmp_path, data_collator=settled).data_collator.layout.name == "shared"
    assert settled.layout == Layout("padded")
