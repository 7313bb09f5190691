"""`make fuse` with a tiny model: the script's commands, in its order, make a fused model; a rerun repeats nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import datasets
import pytest
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrpo import cli
from wrpo.demo import save_model
from wrpo.demo.skills import SKILLS, tasks
from wrpo.demo.verifier import verify

ROOT = Path(__file__).resolve().parent.parent.parent
FUSE = ROOT / "examples" / "fuse"
RECORD = '#!/usr/bin/env bash\nprintf "%s\\t" "$(basename "$0")" "$@" >> "$CALLS"\necho >> "$CALLS"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current folder, but for a tiny model in the place of the demo's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    # Prompts of up to 100 letters, which this tokenizer reads nearly one by one.
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained("fuse-output/target")
    tokenizer.save_pretrained("fuse-output/target")
    return tmp_path


def commands(folder: Path) -> list[list[str]]:
    """What fuse.sh would run now, in order: `wrpo` and `python` only note how they are called."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("wrpo", "python"):
        (programs / name).write_text(RECORD)
        (programs / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    surroundings = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run([FUSE / "fuse.sh"], cwd=folder, env=surroundings, check=True, capture_output=True, timeout=60)
    return [line.rstrip("\t").split("\t") for line in calls.read_text().splitlines()]


def call(words: list[str]) -> int:
    """One command of the script, here."""
    if words[0] == "python":
        assert words[1:3] == ["-m", "wrpo.demo.save_model"]
        return save_model.main(words[3:])
    return cli.main(words[1:])


def rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_script_make_a_fused_model_and_a_rerun_repeats_nothing(folder, capsys):
    first = commands(folder)
    assert [words[1] for words in first if words[0] == "wrpo"] == [
        "score", "build", "sft", "sample", "score", "build", "train", "eval",
    ]  # fmt: skip
    for words in first:
        assert call(words) == 0, (words, capsys.readouterr().err)
    out = folder / "fuse-output"
    held_out = {row["prompt_id"] for row in rows(FUSE / "held_out.jsonl")}
    sft, triples = rows(out / "sft_split/sft.jsonl"), rows(out / "triples/triples.jsonl")
    assert sft
    assert triples
    assert not {row["prompt_id"] for row in sft} & {row["prompt_id"] for row in triples}
    assert {row["prompt_id"] for row in rows(out / "eval/scored.jsonl")} == held_out
    measured = json.loads((out / "eval/eval.json").read_text())["answers"]
    assert {model: groups["all"]["prompts"] for model, groups in measured["worth"].items()} == dict.fromkeys(
        ("before", "sft", "wrpo"), len(held_out)
    )
    assert set(measured["worth"]["wrpo"]) == {"all", *SKILLS}
    target, fused = (AutoModelForCausalLM.from_pretrained(out / name).state_dict() for name in ("target", "wrpo"))
    assert any(not target[name].equal(value) for name, value in fused.items())
    AutoTokenizer.from_pretrained(out / "wrpo")

    again = commands(folder)
    assert [words[1] for words in again if words[0] == "wrpo"] == ["score", "sample", "score", "eval"]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    for words in again:
        assert call(words) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before


def test_the_tutorial_shows_the_commands_of_the_script(folder):
    text = (ROOT / "docs" / "fuse.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = [line.split() for block in blocks for line in block.splitlines()]
    run = [[word.replace(str(FUSE), "examples/fuse") for word in words] for words in commands(folder)]
    assert shown == [words for words in run if words[0] == "wrpo"]


def test_the_shipped_prompts_and_answers_are_those_of_the_demo():
    """And no held-out prompt is about a word that a training prompt is about."""
    known = {task.prompt: (skill, held_out) for skill in SKILLS for held_out in (False, True)
             for task in tasks(skill, held_out=held_out)}  # fmt: skip
    for name, held_out in {"prompts": False, "experts": False, "held_out": True}.items():
        for row in rows(FUSE / f"{name}.jsonl"):
            assert known[row["prompt"]] == (row["skill"], held_out)
    prompts, experts = rows(FUSE / "prompts.jsonl"), rows(FUSE / "experts.jsonl")
    assert {row["prompt_id"] for row in experts} == {row["prompt_id"] for row in prompts}
    assert len({row["model"] for row in experts}) >= 2


def test_the_verifier_scores_as_the_demo_does_and_a_cut_answer_is_worth_nothing():
    (task,) = [task for task in tasks("opposite", held_out=False) if task.key == "long"]
    assert verify(task.prompt, "short", {}) == 1.0
    assert verify(task.prompt, "short", {"finish_reason": "stop"}) == 1.0
    assert verify(task.prompt, "short", {"finish_reason": "length"}) == 0.0
    assert verify(task.prompt, "tall", {}) < 1.0
    with pytest.raises(ValueError, match="not a prompt of the demo's skills"):
        verify("What is 2 + 2?", "4", {})


def test_a_saved_model_stays_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "fuse-output/target").iterdir()}
    assert save_model.main(["fuse-output/target"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "fuse-output/target").iterdir()} == before
