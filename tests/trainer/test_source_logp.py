"""Each source model's mean log-prob of every response, in its own tokens, as the column that the reference takes."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import tiny_model
from tiny_runs import SETTINGS
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrpo import WRPOConfig, WRPOTrainer, cli
from wrpo.data import load_examples, tokenize_examples
from wrpo.reference import source_logp
from wrpo.reference.brought import _warn_once
from wrpo.reference.command import parse
from wrpo.reference.source_logp import with_source_logp

ROWS = [
    {"prompt": "2 + 3?", "source_chosen": ["five, of course", "5"], "target_chosen": "5.", "rejected": "what is the"},
    {"prompt": "hello", "source_chosen": ["hello world"], "target_chosen": "world", "rejected": "2"},
]
OTHER_TEMPLATE = CHATML.replace("<|im_start|>", "<|start|>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Two of different architectures and ways to write a conversation."""
    folders = []
    for name, template in (("gpt2-tied-learned-positions", OTHER_TEMPLATE), ("llama", CHATML)):
        tokenizer = tiny_tokenizer(template)
        folder = tmp_path / name
        tiny_model(name, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def own_mean_logp(folder: str, prompt: str, response: str) -> float:
    """From the model's own logits of the conversation as its own template writes it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": prompt}]
    options = {"tokenize": False}
    start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": response}], **options).rstrip()
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
    first = len(tokenizer(start, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logp = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return logp[first - 1 :].mean().item()


def test_every_response_has_its_mean_log_prob_under_every_model(models, tmp_path):
    scored = with_source_logp(load_examples(ROWS), models, tmp_path / "kept", batch_size=2, progress=False)
    assert len(scored) == 2
    for row, raw in zip(scored, ROWS, strict=True):
        responses = [*raw["source_chosen"], raw["target_chosen"], raw["rejected"]]
        expected = [[own_mean_logp(folder, raw["prompt"], text) for folder in models] for text in responses]
        assert [len(values) for values in row["source_logp"]] == [2] * len(responses)
        for got, truth in zip(row["source_logp"], expected, strict=True):
            assert got == pytest.approx(truth, rel=1e-5)
        assert [json.loads(message)["content"] for message in row["responses"]] == responses


def test_the_command_writes_triples_that_train_with_a_fused_reference(models, tmp_path, capsys):
    source, output = tmp_path / "triples.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["logp", str(source), "-o", str(output), "--models", *models, "--batch_size", "1"]
    assert cli.main(command) == 0
    assert f"triples  {output}" in capsys.readouterr().out
    first = output.read_text()

    tokenizer = tiny_tokenizer()
    tokens = tokenize_examples(load_examples(str(output)), tokenizer)
    args = WRPOConfig(
        output_dir=str(tmp_path / "run"), reference="copy", reference_fusion="max_margin", length_normalize=True,
        beta=2.5, **SETTINGS,
    )  # fmt: skip
    trainer = WRPOTrainer(tiny_model(vocab_size=len(tokenizer)), args, train_dataset=tokens, processing_class=tokenizer)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/target_chosen"] < 1e-6, "a preferred response is clipped from below"
    assert line["rewards/rejected"] > -1e-6, "a rejected one from above"
    assert line["rewards/margins"] < -1e-3, "no source knew better"

    output.unlink()
    assert cli.main(command) == 0  # from what the models gave before
    assert output.read_text() == first


# A row, and where its responses stand in its column: those of its texts, None for one that weighs nothing.
ORDERS = {
    "the worse one first": (
        {"prompt": "hello", "responses": ["2", "hello world"], "role": ["rejected", "target"]},
        ["2", "hello world"],
        [],
    ),
    "a source without a share": (
        {**ROWS[0], "source_weight": [0, 1]},
        [None, "5", "5.", "what is the"],
        [],
    ),
    "scores of all": (
        {"prompt": "hello", "all_generated_responses": ["2", "world", "5"], "all_rm_scores": [1, 3, 0]},
        ["world", "2", "5"],
        ["--from_scores"],
    ),
}


@pytest.mark.parametrize(("row", "texts", "flags"), ORDERS.values(), ids=ORDERS)
def test_the_command_writes_the_column_in_the_order_in_which_it_is_read(row, texts, flags, models, tmp_path):
    source, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps(row) + "\n")
    assert cli.main(["logp", str(source), "-o", str(output), "--models", models[0], *flags]) == 0
    truth = {text: own_mean_logp(models[0], row["prompt"], text) for text in texts if text}
    written = json.loads(output.read_text())["source_logp"]
    assert written == [pytest.approx([truth[text]], rel=1e-5) if text else None for text in texts]
    (example,) = load_examples(str(output), from_scores=bool(flags))
    for response, logp in zip(example["responses"], example["source_logp"], strict=True):
        assert logp == pytest.approx([truth[json.loads(response)["content"]]], rel=1e-5)


@pytest.mark.parametrize(("row", "texts", "flags"), ORDERS.values(), ids=ORDERS)
def test_the_column_of_a_reference_is_the_reference_that_training_would_make(row, texts, flags, models, tmp_path):
    source, output = tmp_path / "rows.jsonl", tmp_path / "referenced.jsonl"
    source.write_text(json.dumps({**row, "ref_logp": [-1.0] * len(texts)}) + "\n")
    assert cli.main(["logp", str(source), "-o", str(output), "--reference", models[1], *flags]) == 0
    written = json.loads(output.read_text())["ref_logp"]
    assert [value is not None for value in written] == [text is not None for text in texts]
    trainers = []
    for name, file in (("made", source), ("brought", output)):
        rows = load_examples(str(file), from_scores=bool(flags))
        if name == "made":
            rows = rows.remove_columns("ref_logp").add_column("ref_logp", [None])
        args = WRPOConfig(output_dir=str(tmp_path / name), **SETTINGS)
        trainer = WRPOTrainer(models[1], args, train_dataset=tokenize_examples(rows, tiny_tokenizer()))
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trainers.append((trainer.reference_source, trainer.reference(trainer.model, batch)))
    (made, expected), (brought, got) = trainers
    assert (made, brought) == ("precompute", "of the data")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", ["--models", "--reference"])
def test_the_layout_that_the_command_names_is_that_of_its_model(flag, models, tmp_path, monkeypatch):
    asked, real = [], source_logp.in_layout
    monkeypatch.setattr(source_logp, "in_layout", lambda wanted, *a, **k: asked.append(wanted) or real(wanted, *a, **k))
    source, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n")
    command = ["logp", str(source), "-o", str(output), flag, models[1], "--overwrite", "--layout", "shared"]
    assert [cli.main(command), cli.main(command)] == [0, 0]
    assert asked == ["shared"], "the second time the log-probs are there, and no model is asked"


@pytest.mark.parametrize("flag", ["--models", "--reference"])
def test_float32_logits_of_the_command_are_those_of_its_model_and_kept_apart(flag, models, tmp_path, monkeypatch):
    asked, real = [], source_logp.sequence_logp
    monkeypatch.setattr(source_logp, "sequence_logp", lambda *a, **k: asked.append(k) or real(*a, **k))
    source, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n")
    command = ["logp", str(source), "-o", str(output), flag, models[1], "--overwrite", "--torch_dtype", "bfloat16"]
    command += ["--layout", "padded"]
    assert [cli.main(command), cli.main([*command, "--logits_dtype", "float32"])] == [0, 0]
    assert [options["logits_dtype"] for options in asked] == [None, torch.float32], "what was kept has other logits"


RUNS = {
    "narrow": {"bf16": True},
    "narrow, float32 logits": {"bf16": True, "logits_dtype": "float32"},
    "wide": {},
    "wide, float32 logits": {"logits_dtype": "float32"},
}


@pytest.fixture
def brought(models, tmp_path) -> dict[str, Path]:
    """Files whose `ref_logp` was made with logits that were rounded to 16 bits or not; of the last nobody knows."""
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n")
    files = {}
    for name, flags in {"rounded": [], "exact": ["--logits_dtype", "float32"], "wide": []}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        dtype = "float32" if name == "wide" else "bfloat16"
        command = ["logp", str(source), "-o", str(files[name]), "--reference", models[1], "--torch_dtype", dtype]
        assert cli.main(command + flags) == 0
    files["alone"] = tmp_path / "alone.jsonl"
    files["alone"].write_text(files["exact"].read_text())
    return files


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What is warned of in this test."""
    heard: list[str] = []
    _warn_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("wrpo.reference"), "warning", lambda text, *_: heard.append(text))
    return heard


def test_a_run_says_that_the_reference_it_is_brought_was_rounded_otherwise(brought, models, tmp_path, warnings):
    """The rounding would be in the log-ratios from the first step on."""
    said = {}
    for name, file in brought.items():
        for run, settings in RUNS.items():
            _warn_once.cache_clear()
            open_rows(file, models[1], tmp_path, settings)
            said[name, run] = [*warnings]
            warnings.clear()
    assert {key for key, lines in said.items() if lines} == {
        *(("rounded", run) for run in RUNS if run != "narrow"),
        ("exact", "narrow"),
        ("wide", "narrow"),
        ("alone", "narrow, float32 logits"),
    }
    (line,) = said["wide", "narrow"]
    assert line.startswith(f"{brought['wide']}: this run rounds its logits to 16 bits and its ref_logp does not")


def test_a_file_is_warned_of_once_by_the_trainer_or_the_command(brought, models, tmp_path, warnings):
    words = ["--model_name_or_path", models[1], "--output_dir", str(tmp_path / "run"), "--use_cpu", "--max_steps", "1"]
    assert cli.main(["train", str(brought["wide"]), *words, "--bf16", "--report_to", "none"]) == 0
    open_rows(brought["wide"], models[1], tmp_path, RUNS["narrow"])
    assert sum("rounds its logits" in line for line in warnings) == 1


def test_a_folder_without_a_name_has_nothing_beside_it(brought, models, tmp_path, monkeypatch, warnings):
    rows = datasets.load_dataset("json", data_files=str(brought["wide"]), split="train")
    rows.save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    open_rows(Path(), models[1], tmp_path, RUNS["narrow"])
    assert not warnings


def open_rows(file: Path, model: str, folder: Path, settings: dict) -> None:
    config = WRPOConfig(**{**SETTINGS, "output_dir": str(folder / "run"), **settings})
    WRPOTrainer(model, config, train_dataset=str(file))


def test_a_reference_is_cut_as_training_cuts():
    settings = parse(["rows.jsonl", "-o", "out.jsonl", "--reference", "model"])
    trained = WRPOConfig(output_dir="run", use_cpu=True)
    assert (settings.max_length, settings.max_prompt_length) == (trained.max_length, trained.max_prompt_length)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{triples}", "-o", "out.jsonl"], "models, reference: expected one of the two, got neither"),
        (["{triples}", "-o", "out.jsonl", "--models", "a", "--reference", "b"], "expected one of the two, got both"),
        (["{triples}", "-o", "out.jsonl", "--models", "a", "--max_prompt_length", "9"], "is for --reference"),
        (["{triples}", "-o", "out.jsonl", "--reference", "nowhere"], "reference 'nowhere'"),
        (
            ["{triples}", "-o", "out.jsonl", "--reference", "a", "--chat_template", "chatml"],
            "chat_template: expected none",
        ),
        (
            ["{triples}", "-o", "out.jsonl", "--reference", "a", "--max_length", "1"],
            "max_length: expected a whole number >=",
        ),
        (
            ["{triples}", "-o", "out.jsonl", "--models", "a", "--max_length", "1"],
            "max_length: expected a whole number >=",
        ),
        (
            ["{triples}", "-o", "out.jsonl", "--reference", "{triples}"],
            "expected a folder or a name on the hub, got a file",
        ),
        (["no.jsonl", "-o", "out.jsonl", "--models", "nowhere"], "no.jsonl"),
        (["{triples}", "-o", "out.jsonl", "--models", "nowhere"], "'nowhere'"),
        (["{triples}", "-o", "out.jsonl", "--modles", "nowhere"], "did you mean 'models'?"),
        (["{triples}", "-o", "out.parquet", "--models", "nowhere"], "expected a file name ending in .jsonl"),
        (["{triples}", "-o", "{triples}", "--models", "nowhere"], "triples.jsonl is there already"),
        (["{triples}", "-o", "{triples}", "--overwrite", "--models", "nowhere"], "is one of the triples"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    triples = Path("triples.jsonl")
    triples.write_text(json.dumps(ROWS[1]) + "\n")
    assert cli.main(["logp", *(argument.format(triples=triples) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out.jsonl").exists()
    assert triples.read_text() == json.dumps(ROWS[1]) + "\n"


def test_what_a_row_holds_besides_stays_in_it(models, tmp_path):
    source, output = tmp_path / "triples.jsonl", tmp_path / "new" / "scored.jsonl"
    rows = [{"prompt_id": f"p{k}", "target_reward": 0.5, "note": "\ud800", **row} for k, row in enumerate(ROWS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["logp", str(source), "-o", str(output), "--models", models[0]]) == 0
    scored = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [len(row.pop("source_logp")) for row in scored] == [4, 3]
    assert scored == rows


def test_a_model_is_gone_before_the_next_one_is_loaded(models, tmp_path, monkeypatch):
    loaded, load = [], source_logp.load_model

    def watched(*args, **kwargs):
        assert not [model for model in loaded if model() is not None], "two models in memory"
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(source_logp, "load_model", watched)
    gc.disable()
    try:
        with_source_logp(load_examples(ROWS), models, tmp_path / "kept", progress=False)
    finally:
        gc.enable()
    assert len(loaded) == 2
