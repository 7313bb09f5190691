"""`wrpo train`, `wrpo dpo` and `wrpo sft`: from a file of settings to a model on disk, or to one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest
import yaml
from tiny_tokenizer import tiny_tokenizer

from wrpo import DPOConfig, SFTConfig, WRPOConfig, cli
from wrpo.data import load_examples
from wrpo.settings import DataSettings, ModelSettings, parse_settings
from wrpo.training.command import parse

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
TRIPLES = str(EXAMPLES / "triples_explicit.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_examples_hold_the_same_triples_in_both_forms():
    explicit, released = (
        load_examples(EXAMPLES / f"triples_{form}.jsonl").remove_columns(["file", "row"])[:]
        for form in ("explicit", "released")
    )
    assert explicit == released


@pytest.mark.parametrize(("name", "config_class"), [("wrpo.yaml", WRPOConfig), ("sft.yaml", SFTConfig)])
def test_every_field_of_the_example_settings_arrives(name, config_class, monkeypatch, tmp_path):
    written = yaml.safe_load((EXAMPLES / name).read_text())
    flags = ["--use_cpu", "--output_dir", str(tmp_path)]
    parts = parse_settings((ModelSettings, DataSettings, config_class), [str(EXAMPLES / name), *flags], "wrpo")
    values = {key: value for part in parts for key, value in vars(part).items()}
    for key in written.keys() - {"output_dir"}:
        expected = [] if written[key] == "none" else written[key]  # what TrainingArguments makes of report_to: none
        assert values[key] == (float(expected) if isinstance(values[key], float) else expected)


@pytest.fixture
def tiny_model(tmp_path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("sft", []),
        ("train", ["--eval_file", str(EXAMPLES / "triples_released.jsonl")]),
        ("train", ["--lora_r", "2", "--lora_target_modules", "q_proj", "lm_head"]),
    ],
    ids=["sft", "train", "train with LoRA"],
)
def test_a_stage_trains_from_an_example_and_says_where_everything_is(command, flags, tiny_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = EXAMPLES / ("sft.yaml" if command == "sft" else "wrpo.yaml")
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out)]
    assert cli.main([command, str(config), *here, "--use_cpu", "--save_strategy", "no", *flags]) == 0
    assert f"model    {out}\n" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics
    assert ("eval_loss" in json.dumps(metrics)) == ("--eval_file" in flags)
    assert AutoTokenizer.from_pretrained(out).chat_template
    if not flags:
        AutoModelForCausalLM.from_pretrained(out)


def test_a_stage_says_how_many_rows_it_takes_from_which_file(tiny_model, tmp_path, monkeypatch, caplog):
    """So that nobody takes the eight rows of the example for data of their own."""
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("wrpo"), "handlers", [logging.NullHandler()])  # else main adds its own
    config, released = str(EXAMPLES / "sft.yaml"), str(EXAMPLES / "triples_released.jsonl")
    here = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert cli.main(["sft", config, *here, "--train_file", released, "--eval_file", TRIPLES]) == 0
    loaded = [record.getMessage() for record in caplog.records if "rows loaded" in record.getMessage()]
    assert loaded == [f"{path}: 8 rows loaded, no bad rows" for path in (released, TRIPLES)]


def test_a_run_that_ends_in_nan_fails_and_saves_nothing(tiny_model, tmp_path, capsys):
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(tmp_path / "out")]
    rates = ["--optim", "sgd", "--learning_rate", "1e38", "--max_grad_norm", "0", "--lr_scheduler_type", "constant"]
    command = ["sft", *here, *rates, "--warmup_steps", "0", "--use_cpu", "--save_strategy", "no", "--max_steps", "2"]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("wrpo sft: training ended in NaN or infinity")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_the_file_that_logp_writes_trains_as_the_reference_that_training_computes_itself(command, tiny_model, tmp_path):
    brought = tmp_path / "brought.jsonl"
    limits = ["--max_length", "60", "--max_prompt_length", "40"]
    assert cli.main(["logp", TRIPLES, "-o", str(brought), "--reference", str(tiny_model), *limits]) == 0
    losses = {}
    for name, rows in (("computed", TRIPLES), ("brought", str(brought))):
        here = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / name), "--use_cpu"]
        often = [
            "--logging_steps",
            "1",
            "--learning_rate",
            "0.01",
            "--warmup_steps",
            "0",
            "--beta",
            "1",
            "--max_steps",
            "3",
        ]
        quick = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--save_strategy", "no"]
        assert cli.main([command, rows, *here, *limits, *often, *quick, "--reference", "precompute"]) == 0
        log = json.loads((tmp_path / name / "metrics.json").read_text())["log_history"]
        losses[name] = [line["loss"] for line in log if "loss" in line]
    assert not (tmp_path / "brought" / "reference").exists(), "the model was asked all the same"
    assert len(set(losses["computed"])) == 3
    # The two passes put rows together otherwise: log-probs of tens of nats to 1e-6 of them.
    assert losses["brought"] == pytest.approx(losses["computed"], rel=1e-5)


def test_a_run_resumes_from_its_newest_checkpoint(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out), "--use_cpu"]
    command = ["sft", str(EXAMPLES / "sft.yaml"), *here, "--logging_steps", "1", "--save_strategy", "steps"]
    command += ["--save_steps", "1"]
    assert cli.main([*command, "--resume_from_checkpoint", "true"]) == 2
    assert f"no checkpoint in {out}" in capsys.readouterr().err
    assert cli.main([*command, "--max_steps", "1"]) == 0
    assert cli.main([*command, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    log = json.loads((out / "metrics.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line] == [1, 2], "the first line is the first run's"


def test_a_checkpoint_that_is_damaged_is_named_as_the_thing_to_drop(tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(out), "--use_cpu"]
    command = ["sft", *here, "--save_steps", "1"]
    assert cli.main([*command, "--max_steps", "1"]) == 0
    (out / "checkpoint-1" / "optimizer.pt").write_bytes(b"no tensors")
    assert cli.main([*command, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"wrpo sft: resume_from_checkpoint: {out}/checkpoint-1 is damaged")
    assert "Drop it" in last


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kernel_backend", "nativ"], "kernel_backend='nativ': "),
        (["--reference", "adapter"], "reference='adapter' needs a PEFT model"),
        (["--lora_r", "2", "--lora_target_modules", "nowhere"], "nowhere"),
        (["--lora_alpha", "5"], "lora_alpha needs lora_r"),
        (["--lora_dropout", "0.5"], "lora_dropout needs lora_r"),
        (
            ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "100"],
            "dataloader_drop_last leaves out all",
        ),
        (["--num_train_epochs", "0"], "num_train_epochs: expected more than 0"),
    ],
)
def test_settings_that_do_not_go_with_the_model_are_one_line(flags, words, tiny_model, tmp_path, capsys):
    here = ["--model_name_or_path", str(tiny_model), "--train_file", TRIPLES, "--output_dir", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(["train", *here, "--use_cpu", "--disable_tqdm", "true", *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("wrpo train: ")
    assert words in last


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path, capsys):
    """A path of several parts is no name of the hub, which would be all that its own message says."""
    command = ["train", "--model_name_or_path", "/runs/of/nobody", "--train_file", TRIPLES]
    assert cli.main([*command, "--use_cpu", "--output_dir", str(tmp_path)]) == 2
    assert "no such folder here: /runs/of/nobody" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    command = ["train", "--model_name_or_path", str(tmp_path / "nothing"), "--train_file", TRIPLES]
    assert cli.main([*command, "--use_cpu", "--output_dir", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"wrpo train: model_name_or_path '{tmp_path / 'nothing'}': ")
    assert shown.count("\n") == 1


def test_a_tokenizer_without_a_chat_template_trains_where_the_settings_say_so_and_is_asked_the_same_way(
    tiny_model, tmp_path, capsys
):
    tiny_tokenizer(chat_template=None).save_pretrained(tiny_model)
    (tiny_model / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"prompt": f"{n}?", "source_chosen": f"yes {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["sft", str(tmp_path / "rows.jsonl"), "--model_name_or_path", str(tiny_model), "--use_cpu"]
    command += ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    assert cli.main(command) == 2
    assert "set chat_template to none" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*command, "--chat_template", "none"]) == 0

    source = {"model": "trained", "kind": "transformers", "path": str(tmp_path / "out"), "samples": 1}
    (tmp_path / "sources.yaml").write_text(json.dumps([source]))
    words = [str(tmp_path / name) for name in ("sources.yaml", "rows.jsonl")]
    assert cli.main(["sample", *words, "-o", str(tmp_path / "answers.jsonl"), "--max_tokens", "2"]) == 0


def test_a_data_set_is_found_by_its_name(tiny_model, tmp_path, caplog, monkeypatch):
    """A folder in the layout of the hub stands in for the hub."""
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("wrpo"), "handlers", [logging.NullHandler()])
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 3), ("test", 5)):
        lines = [json.dumps({"prompt": f"{n}?", "source_chosen": f"yes {n}"}) + "\n" for n in range(rows)]
        (data / f"{split}.jsonl").write_text("".join(lines))
    command = ["sft", "--dataset_name", str(data), "--dataset_split", "test[:4]", "--output_dir", str(tmp_path / "out")]
    command += ["--model_name_or_path", str(tiny_model), "--use_cpu", "--save_strategy", "no"]
    assert cli.main(command) == 0
    assert "4 rows loaded" in caplog.text
    assert cli.main([*command, "--dataset_train_split", "train", "--dataset_test_split", "test[:2]"]) == 0
    assert "3 rows loaded" in caplog.text and "2 rows loaded" in caplog.text
    log = json.loads((tmp_path / "out" / "metrics.json").read_text())["log_history"]
    assert [line["epoch"] for line in log if "eval_loss" in line] == [1.0]


def test_a_data_set_that_is_not_there_is_one_line(tiny_model, tmp_path, capsys):
    command = ["sft", "--dataset_name", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert cli.main([*command, "--model_name_or_path", str(tiny_model)]) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith(f"wrpo sft: {tmp_path / 'nowhere'}: expected a data set with the split")


def test_dpo_takes_the_pairs_as_a_word_and_needs_a_model(capsys):
    assert cli.main(["dpo", "pairs.jsonl", "--use_cpu"]) == 2
    assert capsys.readouterr().err.startswith(
        "wrpo dpo: model_name_or_path: expected a value, got none. Give it as --mod"
    )
    _, data, _ = parse("dpo", DPOConfig, ["pairs.jsonl", "--model_name_or_path", "m", "--use_cpu"])
    assert data.train_file == "pairs.jsonl"
