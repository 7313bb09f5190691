"""What is loaded is what was saved: a parameter that the files lack, or hold in another shape, is one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from tiny_tokenizer import CHATML, tiny_tokenizer
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from wrpo import cli
from wrpo.pretrained import load_model, load_tokenizer
from wrpo.pretrained.checkpoint import not_loaded
from wrpo.settings import ModelSettings, SettingsError

ROW = {"prompt": "2 + 3?", "chosen": ["five", "5"], "rejected": "6"}
LOST = "model.layers.1.mlp.up_proj.weight"
EDITS = {
    "a weight is missing": (
        lambda weights: {name: value for name, value in weights.items() if name != LOST},
        f"no trained weights for {LOST} (1 of 21 parameters): they would be random. Name a model that was trained",
    ),
    "compiled": (
        lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
        "(21 of 21 parameters): they would be random. The files have _orig_mod.lm_head.weight: take '_orig_mod.' off",
    ),
    "DataParallel": (
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        "The files have module.lm_head.weight: take 'module.' off the names in them",
    ),
    "another vocabulary": (
        lambda weights: {k: v[:-3].contiguous() if k == "lm_head.weight" else v for k, v in weights.items()},
        "lm_head.weight is [94, 32] in its files and [97, 32] by its config, and 0 more weights have other shapes",
    ),
}


def save(folder: Path, model: nn.Module | None = None) -> Path:
    (tiny_model() if model is None else model).save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return folder


def edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "words"), EDITS.values(), ids=EDITS)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line_that_says_why(change, words, tmp_path, caplog):
    edit(save(tmp_path), change)
    with pytest.raises(SettingsError) as caught:
        load_model(ModelSettings(str(tmp_path)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("command", ["train", "dpo", "sft", "sample", "logp", "eval"])
def test_every_command_refuses_it(command, tmp_path, capsys):
    model = save(tmp_path / "model", tiny_model(vocab_size=340))
    edit(model, EDITS["a weight is missing"][0])
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt_id": "a", **ROW}) + "\n")
    source = {"model": "m", "kind": "transformers", "path": str(model)}
    (tmp_path / "sources.yaml").write_text(json.dumps([source]))
    training = [str(rows), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    arguments = {
        "sample": [str(tmp_path / "sources.yaml"), str(rows), "-o", str(out)],
        "logp": [str(rows), "-o", str(out), "--models", str(model)],
        "eval": ["--triples", str(rows), "--policy", str(model), "--reference", str(model), "-o", str(tmp_path / "e")],
    }
    capsys.readouterr()
    assert cli.main([command, *arguments.get(command, training)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"wrpo {command}: ")
    assert f"no trained weights for {LOST}" in last


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_whole_without_its_tied_weights_and_buffers(family, tmp_path):
    model = tiny_model(family, pad_token_id=None)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelSettings(str(tmp_path)))
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_a_parameter_that_is_there_under_another_name_and_a_buffer_are_loaded():
    model = nn.Module()
    model.body, model.head, model.other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    model.head.weight = model.body.weight
    model.register_buffer("positions", torch.zeros(2))
    assert not_loaded(model, {"head.weight", "positions"}) == []
    assert not_loaded(model, {"head.weight", "body.weight", "other.bias"}) == [
        "body.weight",
        "head.weight",
        "other.bias",
    ]


def test_weights_that_have_no_place_in_the_model_are_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    edit(save(tmp_path), lambda weights: weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(3)})
    load_model(ModelSettings(str(tmp_path)))
    assert "1 of its weights have no place in the model, the first: model.layers.2.mlp.up_proj.weight" in caplog.text


def test_an_architecture_that_is_no_causal_language_model_is_one_short_line(tmp_path):
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="T5Config is of no model that AutoModelForCausalLM knows") as caught:
        load_model(ModelSettings(str(tmp_path)))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "nonsense"}'),
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}'),
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
        lambda folder: (folder / "model.safetensors").unlink(),
    ],
    ids=["no type", "unknown type", "nonsense", "weights cut off", "no weights"],
)
def test_a_folder_that_cannot_be_read_is_one_short_line(spoil, tmp_path):
    spoil(save(tmp_path))
    with pytest.raises(SettingsError, match=f"^model_name_or_path '{tmp_path}': ") as caught:
        load_model(ModelSettings(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("model.safetensors", "Name its folder$"),
        ("tiny.gguf", "Name its folder; and the file in gguf_file: tiny.gguf$"),
    ],
)
def test_a_file_in_the_place_of_its_folder_is_told_how_to_name_it(name, todo, tmp_path):
    (save(tmp_path) / name).touch()
    for load in (load_model, load_tokenizer):
        with pytest.raises(SettingsError, match=f"expected a folder or a name on the hub, got a file. {todo}"):
            load(ModelSettings(str(tmp_path / name)))


def test_a_folder_of_gguf_files_alone_says_which_there_are_and_one_of_that_name_is_a_folder(tmp_path):
    folder = tmp_path / "tiny.gguf"
    assert type(load_model(ModelSettings(str(save(folder))))) is type(tiny_model())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "q4.gguf").touch()
    with pytest.raises(SettingsError, match=r"It holds q4\.gguf: name it in gguf_file$"):
        load_model(ModelSettings(str(tmp_path / "other")))
