"""The recipes under examples/: settings and command lines of the pages parse, and the paper's numbers are in them."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from itertools import dropwhile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_models import tiny_rows
from tiny_runs import wrpo_trainer

import wrpo.building.command
import wrpo.evaluation.command
import wrpo.sampling.command
import wrpo.scoring.command
import wrpo.training.command
from wrpo import DPOConfig, SFTConfig, WRPOConfig
from wrpo.building import BuildSettings
from wrpo.evaluation.answers import Answer
from wrpo.evaluation.benchmark_files import write_alpaca_eval, write_arena_hard
from wrpo.rows.messages import asked
from wrpo.sampling.sources import VllmSource, read_sources
from wrpo.user_error import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = ROOT / "examples" / "llama3_ultrafeedback"
PAPER = {  # arXiv:2412.03187, appendix, and the files of its code
    "sft.yaml": {"learning_rate": 7e-6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "wrpo.yaml": {
        "learning_rate": 3e-7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "beta": 0.01,
        "alpha": 0.1,
        "alpha_start": 0.0,
        "alpha_schedule": "linear",
        "loss_type": "sigmoid",
    },
}
BOTH_STAGES = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "max_length": 2048,
    "max_prompt_length": 1800,
    "seed": 42,
    "bf16": True,
}
TRAINING = {"sft": SFTConfig, "train": WRPOConfig, "dpo": DPOConfig}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def training_settings(command: str, arguments: list[str]) -> tuple:
    """On the CPU: `bf16: true` asks for a GPU otherwise."""
    return wrpo.training.command.parse(command, TRAINING[command], [*arguments, "--use_cpu"])


PARSERS = {
    "sample": lambda arguments: read_sources(wrpo.sampling.command.parse(arguments)[0].sources),
    "score": wrpo.scoring.command.parse,
    "build": wrpo.building.command.parse,
    "eval": wrpo.evaluation.command.parse,
    "sft": lambda arguments: training_settings("sft", arguments),
    "dpo": lambda arguments: training_settings("dpo", arguments),
    "train": lambda arguments: training_settings("train", arguments),
}


def command_lines() -> list[list[str]]:
    """The words of every line in the pages' shell blocks that calls `wrpo` with settings, also through accelerate."""
    lines = []
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            words = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
            called = [list(dropwhile(lambda word: re.match(r"\w+=", word), line)) for line in words]
            lines += [line for line in called if line and line[0] in ("wrpo", "accelerate") and line[1:] != ["info"]]
    return lines


COMMANDS = command_lines()


def test_the_pages_show_every_command_of_the_way():
    shown = {words[words.index("wrpo") + 1] for words in COMMANDS}
    assert shown == set(PARSERS)


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_command_line_of_the_pages_parses(words, monkeypatch):
    monkeypatch.setenv("BIG_MODEL_KEY", "a key")
    start = words.index("wrpo")
    if "accelerate" in words:
        parsed = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        assert (parsed.module, parsed.training_script) == (True, "wrpo")
        assert parsed.training_script_args == words[start + 1 :]
        assert Path(parsed.config_file).is_file()
    PARSERS[words[start + 1]](words[start + 2 :])


def test_a_wrong_flag_would_be_found():
    for command, flag in {"sample": "--sample", "score": "--batchsize", "eval": "--prompt", "train": "--bta"}.items():
        with pytest.raises(UserError):
            PARSERS[command](["a.yaml", "b", "-o", "c", flag, "1"] if command != "train" else [flag, "1"])


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_training_has_the_papers_settings(name):
    _, _, config = training_settings("sft" if name == "sft.yaml" else "train", [str(RECIPE / name)])
    wanted = PAPER[name] | BOTH_STAGES
    assert {field: getattr(config, field) for field in wanted} == wanted
    gpus = yaml.safe_load((RECIPE / "fsdp.yaml").read_text())["num_processes"]
    assert gpus * config.per_device_train_batch_size * config.gradient_accumulation_steps == 128


def test_the_second_stage_starts_from_what_the_first_saves_and_on_the_other_prompts():
    settings = {name: yaml.safe_load((RECIPE / f"{name}.yaml").read_text()) for name in
                ("sft", "wrpo", "sft_split", "triples")}  # fmt: skip
    assert settings["wrpo"]["model_name_or_path"] == settings["sft"]["output_dir"]
    assert settings["sft"]["train_file"] == settings["sft_split"]["output_dir"] + "/sft.jsonl"
    assert settings["wrpo"]["train_file"] == settings["triples"]["output_dir"] + "/triples.jsonl"
    shared = ("seed", "sft_share")  # what decides the part of a prompt
    assert [settings["sft_split"][name] for name in shared] == [settings["triples"][name] for name in shared]
    assert settings["triples"]["sft_share"] == 1 / 3


def test_the_sources_are_the_papers_ten_and_drawn_as_there():
    sources = read_sources(RECIPE / "sources.yaml")
    assert len(sources) == 10
    _, drawn = wrpo.sampling.command.parse(["a.yaml", "b.jsonl", "-o", "c.jsonl"])
    assert (drawn.samples, drawn.temperature, drawn.top_p) == (5, 0.8, 0.95)
    assert all((source.samples, source.temperature, source.top_p) == (None, None, None) for source in sources)
    (target,) = read_sources(RECIPE / "target.yaml")
    assert isinstance(target, VllmSource)
    assert target.model == BuildSettings().target


def test_the_reference_pass_of_a_sharded_run_takes_place_where_the_batches_are(tmp_path, monkeypatch):
    """Under FSDP the Trainer itself leaves the model where it was loaded, on the CPU, until training begins."""
    trainer = wrpo_trainer(tmp_path)
    moved = []
    monkeypatch.setattr(trainer.model, "to", lambda device: moved.append(device))
    trainer.open_reference(None)
    assert moved == []
    trainer.place_model_on_device = False
    for reference in ("precompute", "copy"):
        trainer.args.reference, trainer.train_dataset = reference, tiny_rows()
        trainer.open_reference(None)
    assert moved == [trainer.args.device] * 2


def test_accelerate_accepts_the_sharding():
    config = load_config_from_file(str(RECIPE / "fsdp.yaml"))
    assert config.distributed_type.value == "FSDP"
    assert config.mixed_precision == "bf16"
    parsed = launch_command_parser().parse_args(["--config_file", str(RECIPE / "fsdp.yaml"), "-m", "wrpo", "sft"])
    arguments, _, _ = _validate_launch_command(parsed)
    assert arguments.use_fsdp
    assert arguments.fsdp_version == 2
    assert arguments.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer"


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "examples").glob("*.yaml")])
def test_an_example_file_of_settings_parses(name, monkeypatch):
    monkeypatch.setenv("BIG_MODEL_KEY", "a key")
    path = str(ROOT / "examples" / name)
    if isinstance(yaml.safe_load(Path(path).read_text()), list):
        assert read_sources(path)
    else:
        training_settings("sft" if name.startswith("sft") else "train", [path])


def test_the_benchmarks_prompts_come_back_under_their_own_text_and_ids(tmp_path, monkeypatch):
    """In by the recipe's converter, out by the exports: what a benchmark joins on is unchanged."""
    instructions = [{"instruction": "What is\n2 + 2? 😀", "dataset": "koala", "output": "4"}]
    questions = [{"uid": "0a1b", "category": "arena-hard-v0.1", "cluster": "Sums", "prompt": "And 3 + 3?"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(instructions))
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    answers = []
    for name in ("alpaca_eval.json", "question.jsonl"):
        monkeypatch.setattr(sys, "argv", ["benchmark_prompts.py", str(tmp_path / name), str(tmp_path / "out.jsonl")])
        runpy.run_path(str(RECIPE / "benchmark_prompts.py"), run_name="__main__")
        (row,) = map(json.loads, (tmp_path / "out.jsonl").read_bytes().splitlines())
        fields = {name: row[name] for name in ("category", "cluster") if name in row}
        answers.append(Answer(row["prompt_id"], asked(row), "m", 0, "six", None, fields))
    (outputs,) = write_alpaca_eval(answers[:1], tmp_path / "alpaca")
    assert json.loads(outputs.read_text())[0]["instruction"] == instructions[0]["instruction"]
    written, _ = write_arena_hard(answers[1:], tmp_path / "arena")
    assert [json.loads(line) for line in written.read_bytes().splitlines()] == questions
