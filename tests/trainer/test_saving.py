"""A model that was trained is saved, or its weights are somewhere; and what is saved stops where it learnt to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from tiny_runs import SETTINGS, weights, wrpo_trainer
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Trainer

from wrpo import SFTConfig, SFTTrainer, cli
from wrpo.training import saving
from wrpo.training.generation import end_tokens, saveable, taught_ends, without_unusable
from wrpo.training.saving import RESCUED, written
from wrpo.user_error import UserError

ROWS = [{"prompt": f"{n} + 3?", "chosen": ["five", "5"], "rejected": "6"} for n in range(4)]
EOS, END_OF_TURN = 1, 3  # <bos> plays the old end here, <|im_end|> ends the turns of the template
LORA = LoraConfig(target_modules=["q_proj"], r=2)

# generation_config.json that transformers loads, with a warning at most, and does not write once it was changed
UNSAVEABLE = {
    "temperature without sampling": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "top_k alone": {"top_k": 20},
    "beams without beams": {"early_stopping": True, "length_penalty": 2.0},
    "both": {"early_stopping": True, "temperature": 0.6},
    "scores of nobody": {"output_scores": True},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A base model that ends at <bos>, with a template that ends turns with <|im_end|>."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<bos>"
    tiny_model(vocab_size=len(tokenizer), eos_token_id=EOS).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train(command: str, folder: Path, out: Path, *flags: str) -> int:
    (out.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    place = [str(out.parent / "rows.jsonl"), "--model_name_or_path", str(folder), "--output_dir", str(out)]
    quick = ["--use_cpu", "--draw_curves", "false", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    return cli.main([command, *place, *quick, *flags])


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize(
    ("command", "fields"),
    [*(("train", fields) for fields in UNSAVEABLE.values()), ("dpo", UNSAVEABLE["both"]), ("sft", UNSAVEABLE["both"])],
    ids=[*UNSAVEABLE, "dpo", "sft"],
)
def test_settings_that_transformers_does_not_write_are_repaired_with_a_warning(
    command, fields, folder, tmp_path, capsys
):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": EOS, **fields}))
    assert train(command, folder, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1") == 0
    assert "generation_config could not be saved as it is" in capsys.readouterr().err
    for place in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert written(place)
        AutoModelForCausalLM.from_pretrained(place).save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"early_stopping": True, "repetition_penalty": 1.2}, {"early_stopping": None, "repetition_penalty": 1.2}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        ({"num_return_sequences": 3, "eos_token_id": [2, 3]}, {"do_sample": True, "eos_token_id": [2, 3]}),
    ],
)
def test_a_repair_keeps_what_it_can(fields, kept):
    config = GenerationConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    repaired, change = saveable(config)
    repaired.validate(strict=True)
    assert {name: getattr(repaired, name) for name in kept} == kept
    assert bool(change) == (kept != fields)


# Field: (what a checkpoint says, what is kept of it, what is said of the rest); the model has 97 tokens.
UNUSABLE = {
    "eos_token_id": [("</s>", None, "'</s>'"), ("2", None, "'2'"), (-1, None, "-1"), (97, None, "97"),
                     (True, None, "True"), (1.5, None, "1.5"), (10**40, None, "1000000"), ({"a": 1}, None, "{'a': 1}"),
                     ([1, "x", -5, 97, [2]], [1], "'x', -5, 97, [2]"), ([None, 2], [2], "None"), (["x"], None, "'x'"),
                     ([1, 96], [1, 96], ""), (2, 2, ""), ([], [], "")],
    "pad_token_id": [(-1, None, "-1"), (99, None, "99"), (0, 0, "")],
    "temperature": [("hot", None, "'hot'"), ([1], None, "[1]"), (-1, None, "-1"), (float("nan"), None, "nan"),
                    (0.7, 0.7, ""), (0, 0, "")],
    "top_k": [("all", None, "'all'"), (20, 20, "")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "kept", "words"), [(n, *case) for n, cases in UNUSABLE.items() for case in cases]
)
def test_token_ids_that_the_model_does_not_have_and_numbers_that_are_none_are_left_out_and_named(
    name, given, kept, words
):
    config = GenerationConfig()
    setattr(config, name, given)
    sound, left_out = without_unusable(config, 97)
    assert getattr(sound, name) == kept
    assert left_out.startswith(f"{name} {words}" if words else "") and bool(left_out) == bool(words)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eos_token_id": ["</s>", -1, EOS, 99999]}, [EOS, END_OF_TURN]),
        ({"eos_token_id": 1.5, "temperature": "hot"}, [EOS, END_OF_TURN]),  # EOS is the tokenizer's
    ],
)
def test_what_cannot_be_used_is_not_saved_with_the_model(fields, expected, folder, tmp_path, capsys):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    assert train("sft", folder, tmp_path / "out", "--save_strategy", "no") == 0
    assert "saved without what cannot be used: eos_token_id" in capsys.readouterr().err
    assert sorted(settings_of(tmp_path / "out")["eos_token_id"]) == expected
    assert "temperature" not in settings_of(tmp_path / "out")


@pytest.mark.parametrize("command", ["train", "dpo", "sft"])
@pytest.mark.parametrize("flags", [[], ["--lora_r", "2"]], ids=["full", "LoRA"])
def test_the_end_of_turn_that_training_teaches_ends_the_saved_model_and_its_checkpoints(
    command, flags, folder, tmp_path
):
    assert end_tokens(AutoModelForCausalLM.from_pretrained(folder).generation_config) == [EOS]
    assert train(command, folder, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1", *flags) == 0
    for place in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert sorted(settings_of(place)["eos_token_id"]) == [EOS, END_OF_TURN]


def test_a_base_model_that_has_learnt_a_chat_template_stops(folder, tmp_path):
    rows = [{"prompt_id": str(n), "prompt": f"hello {n}", "response": "five"} for n in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), **SETTINGS, max_steps=60, learning_rate=3e-2, lr_scheduler_type="constant"
    )
    trainer = SFTTrainer(str(folder), args, train_dataset=str(tmp_path / "sft.jsonl"))
    trainer.train()
    trainer.save_model()
    source = {"model": "m", "kind": "transformers", "path": str(tmp_path / "out"), "torch_dtype": "float32"}
    (tmp_path / "sources.yaml").write_text(json.dumps([source]))
    out = tmp_path / "answers.jsonl"
    words = [str(tmp_path / name) for name in ("sources.yaml", "sft.jsonl")]
    assert (
        cli.main(["sample", *words, "-o", str(out), "--samples", "1", "--temperature", "0", "--max_tokens", "9"]) == 0
    )
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["response"], row["finish_reason"]) for row in answers} == {("five", "stop")}


def test_only_special_tokens_that_answers_end_with_are_taught():
    tokenizer = tiny_tokenizer()

    def rows(*ends: int) -> list[dict]:
        return [{"prompt_ids": [9], "response_ids": [[9, end]]} for end in ends]

    assert taught_ends(rows(3, 3, 3), tokenizer) == [3]
    assert taught_ends(rows(3, 3, 5, 5), tokenizer) == [3, 5], "a call of a tool may end otherwise"
    assert taught_ends(rows(*[3] * 99, 5), tokenizer) == [3], "one that was cut there"
    assert taught_ends(rows(30, 31), tokenizer) == []
    assert taught_ends(rows(3), None) == []


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_of_a_save_that_fails_are_left_and_the_message_says_where(adapted, tmp_path, monkeypatch):
    model = get_peft_model(tiny_model(), LORA) if adapted else tiny_model()
    trainer = wrpo_trainer(tmp_path / "run", model, reference="none", max_steps=1, learning_rate=0.1)
    trainer.train()

    def fails(*_args, **_options):
        raise RuntimeError("some tensors share memory")

    monkeypatch.setattr(PeftModel if adapted else PreTrainedModel, "save_pretrained", fails)
    with pytest.raises(UserError, match="could not be saved: RuntimeError: some tensors share memory") as caught:
        trainer.save_model()
    place = tmp_path / "run" / RESCUED
    assert f"model.load_state_dict(torch.load('{place}'), strict=False)" in str(caught.value)
    fresh = get_peft_model(tiny_model(seed=0), LORA) if adapted else tiny_model(seed=5)
    fresh.load_state_dict(torch.load(place), strict=False)
    expected = weights(trainer)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


def test_weights_that_the_output_folder_cannot_hold_go_to_a_temporary_one(tmp_path, monkeypatch):
    trainer = wrpo_trainer(tmp_path / "run", max_steps=1)
    real = torch.save

    def full(value, place, *rest):
        if str(place).startswith(str(tmp_path / "run")):
            raise OSError(28, "No space left on device")
        real(value, place, *rest)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(saving.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"No space left on device. The weights are in .*/wrpo-"):
        trainer.save_model()
    (place,) = tmp_path.glob(f"wrpo-*/{RESCUED}")
    assert torch.load(place).keys() == weights(trainer).keys()
    assert not (tmp_path / "run" / RESCUED).exists()


def test_where_nothing_can_be_written_the_error_is_the_first_one(tmp_path, monkeypatch):
    trainer = wrpo_trainer(tmp_path / "run", max_steps=1)

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.save_model()


def test_what_cannot_be_written_is_refused_before_training(tmp_path):
    class Tokenizer(type(tiny_tokenizer())):
        def save_pretrained(self, *_args, **_options):
            raise TypeError("a tokenizer with a lambda in it")

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Tokenizer
    with pytest.raises(
        ValueError, match="tokenizer: cannot be saved, so nothing is trained: TypeError: a tokenizer with"
    ):
        wrpo_trainer(tmp_path / "a", processing_class=tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        wrpo_trainer(tmp_path / "file" / "run")


def test_looking_whether_it_can_be_saved_leaves_nothing_behind(tmp_path):
    wrpo_trainer(tmp_path / "run", processing_class=tiny_tokenizer())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_writes_no_weights_does_not_say_that_it_has(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "save_model", lambda *_args, **_options: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of the run before")
    assert train("sft", folder, tmp_path / "out", "--save_strategy", "no") == 2
    shown = capsys.readouterr()
    assert "saving has written no weights to" in shown.err.splitlines()[-1]
    assert "model " not in shown.out


def test_the_log_says_which_end_is_new(folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="wrpo")
    args = SFTConfig(output_dir=str(tmp_path / "out"), **SETTINGS)
    SFTTrainer(str(folder), args, train_dataset=[{"prompt": "a", "response": "b"}])
    assert "Answers of the data end with '<|im_end|>': the saved model stops there too" in caplog.text
