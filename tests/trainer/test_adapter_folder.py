"""The folder of a LoRA stands for the adapted model: training starts from it, compares with it, and is saved on it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import plain_logp, preference_batch, tiny_model
from tiny_runs import SETTINGS, training_lines
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer, cli
from wrpo.pretrained import load_model
from wrpo.settings import ModelSettings, SettingsError

ROWS = [
    {"prompt": f"{n} + 3?", "chosen": ["five, of course", "5"], "rejected": f"the sum of {n} and three"}
    for n in range(6)
]
QUICK = ["--use_cpu", "--save_strategy", "no", "--draw_curves", "false", "--per_device_train_batch_size", "2"]
STEPS = ["--max_steps", "3", "--gradient_accumulation_steps", "1", "--learning_rate", "0.05"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def base(tmp_path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """A LoRA whose output differs from that of its model by nats, beside its tokenizer."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "sft")
    tiny_tokenizer().save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 20)[None]).logits


def of_adapter(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def command(name: str, model: Path, out: Path, *flags: str) -> int:
    (out.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    place = ["--model_name_or_path", str(model), "--output_dir", str(out)]
    return cli.main([name, str(out.parent / "rows.jsonl"), *place, *QUICK, *STEPS, *flags])


@pytest.mark.parametrize("name", ["train", "dpo", "sft"])
def test_training_goes_on_with_it_and_saves_an_adapter_on_the_same_model(name, base, adapter, tmp_path, monkeypatch):
    starts = []
    trainer = SFTTrainer if name == "sft" else WRPOTrainer
    init = trainer.__init__

    def watched(self, model, *args, **options):
        starts.append(logits(model))
        init(self, model, *args, **options)

    monkeypatch.setattr(trainer, "__init__", watched)
    before = of_adapter(base, adapter)
    assert (before - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1
    assert command(name, adapter, tmp_path / "out", "--lora_r", "4") == 0
    assert torch.equal(starts[0], before)
    line = json.loads((tmp_path / "out" / "metrics.json").read_text())["log_history"][0]
    if name != "sft":
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is the model of the start"
    after = of_adapter(base, tmp_path / "out")
    assert (after - before).abs().max() > 1e-3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(logits(load_model(ModelSettings(str(tmp_path / "out")))), after)


@pytest.mark.parametrize("name", ["train", "sft"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "expected a whole model, since lora_r 0 trains all weights, got an adapter. Go on with it by lora_r 4"),
        (["--lora_r", "8"], "lora_r: expected 4, that of the adapter in"),
        (["--lora_r", "4", "--lora_alpha", "16"], "lora_alpha: expected 8, that of the adapter in"),
        (["--lora_r", "4", "--lora_dropout", "0.1"], "lora_dropout: expected 0.0, that of the adapter in"),
        (["--lora_r", "4", "--lora_target_modules", "q_proj"], "lora_target_modules: expected ["),
    ],
)
def test_other_training_than_the_adapters_is_one_line_before_anything_is_loaded(
    name, flags, words, adapter, tmp_path, capsys
):
    assert command(name, adapter, tmp_path / "out", *flags) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "merge_and_unload" in shown
    assert shown.count("\n") == 1


def test_its_own_settings_may_be_said_again(adapter, tmp_path):
    flags = ["--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "lm_head", "q_proj"]
    assert command("sft", adapter, tmp_path / "out", *flags) == 0


def test_the_model_without_it_is_no_reference(adapter, tmp_path, capsys):
    assert command("train", adapter, tmp_path / "out", "--lora_r", "4", "--reference", "adapter") == 2
    assert "reference: adapter is the model without its adapter" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("reference", ["auto", "copy", "precompute"])
def test_a_trainer_given_its_folder_goes_on_with_it_too(reference, base, adapter, tmp_path):
    args = WRPOConfig(output_dir=str(tmp_path / "out"), **SETTINGS, reference=reference, max_steps=2)
    trainer = WRPOTrainer(str(adapter), args, train_dataset=ROWS)
    assert torch.equal(logits(trainer.model), of_adapter(base, adapter))
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad():
        expected = plain_logp(whole, preference_batch(rows))
    got = trainer.reference(trainer.model, trainer.data_collator(rows))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    trainer.train()
    assert training_lines(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("form", ["folder", "PEFT's model", "transformers' model"])
def test_a_second_adapter_does_not_take_its_place(form, base, adapter, tmp_path):
    model = {
        "folder": lambda: str(adapter),
        "PEFT's model": lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
        "transformers' model": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    }[form]()
    args = SFTConfig(output_dir=str(tmp_path / "out"), **SETTINGS)
    with pytest.raises(ValueError, match="peft_config would put a second adapter on the model"):
        SFTTrainer(model, args, train_dataset=ROWS, processing_class=tiny_tokenizer(), peft_config=LoraConfig(r=2))


def test_merged_as_the_message_says_it_is_a_model_that_anything_starts_from(base, adapter, tmp_path):
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), of_adapter(base, adapter), rtol=1e-4, atol=1e-4)
    assert command("train", tmp_path / "merged", tmp_path / "out", "--lora_r", "2") == 0
    assert command("sft", tmp_path / "merged", tmp_path / "whole") == 0


def change_weights(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(adapter: Path, **fields) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda adapter: change_weights(adapter, lambda w: {k: v for k, v in w.items() if "layers.0" not in k}),
            "2 weights of the adapter are missing, or have no place on",
        ),
        (
            lambda adapter: change_weights(adapter, lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}),
            "13 weights of the adapter are missing, or have no place on",
        ),
        (
            lambda adapter: change_weights(adapter, lambda w: {k: v[:, :-1].contiguous() for k, v in w.items()}),
            "is [4, 31] in the adapter, and [4, 32] on this model",
        ),
        (lambda adapter: change_config(adapter, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda adapter: change_config(adapter, base_model_name_or_path="nowhere"), "whose model is 'nowhere'"),
        (lambda adapter: change_config(adapter, peft_type="MAGIC"), "MAGIC"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "JSONDecodeError"),
        (lambda adapter: tiny_model().save_pretrained(adapter), "holds a whole model and an adapter"),
        (
            lambda adapter: change_config(adapter, base_model_name_or_path=str(adapter)),
            "is an adapter itself. To start anew",
        ),
    ],
)
def test_an_adapter_that_is_not_whole_or_of_no_model_is_one_line(spoil, words, adapter):
    spoil(adapter)
    with pytest.raises(SettingsError, match=f"model_name_or_path '{adapter}'") as caught:
        load_model(ModelSettings(str(adapter)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_answers_as_it_was_trained_to(base, adapter, tmp_path):
    """Generation settings that lie beside the adapter hold, those of its model otherwise."""
    assert load_model(ModelSettings(str(adapter))).generation_config.eos_token_id == 2
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert load_model(ModelSettings(str(adapter))).get_base_model().generation_config.eos_token_id == [2, 3]


def test_the_log_says_what_training_goes_on_with(base, adapter, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="wrpo")
    load_model(ModelSettings(str(adapter)), is_trained=True)
    assert f"training goes on with its adapter on {base}: lora_r 4, lora_alpha 8, lora_dropout 0.0" in caplog.text


def test_an_adapter_that_was_saved_with_more_tokens_than_its_model_has_says_both_sizes_and_how_to_merge_them(
    base, tmp_path
):
    tokenizer, resized = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens(["<more>"])
    resized.resize_token_embeddings(len(tokenizer))
    tuned = get_peft_model(resized, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folder, count = tmp_path / "more", len(tokenizer)
    tuned.save_pretrained(folder)
    with pytest.raises(
        SettingsError, match=rf"embed_tokens.weight is \[{count}, 32\] .* \[{count - 1}, 32\]"
    ) as caught:
        load_model(ModelSettings(str(folder), lora_r=2))
    assert "\n" not in str(caught.value)
    recipe = str(caught.value).partition("Merge the two: ")[2].rpartition(", and save")[0]
    names = {"transformers": transformers, "peft": peft, "MERGED": str(tmp_path / "merged")}
    exec(recipe, names)  # what the message says is what has to work
    torch.testing.assert_close(logits(load_model(ModelSettings(str(tmp_path / "merged")))), logits(tuned))


def test_another_weight_of_another_shape_says_both_sizes(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(SettingsError, match=r"lora_A.*is \[4, 32\] in the adapter, and \[3, 32\] on this model"):
        load_model(ModelSettings(str(adapter), lora_r=3))


def test_generation_settings_of_an_adapter_that_nobody_can_read_are_one_line(adapter):
    (adapter / "generation_config.json").write_text("[1]")
    with pytest.raises(SettingsError, match=r"its generation_config\.json: TypeError"):
        load_model(ModelSettings(str(adapter)))
