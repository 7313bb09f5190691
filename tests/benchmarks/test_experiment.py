"""The experiment: verifiers that tell right from nearly right, statistics from first principles, runs that continue."""

from __future__ import annotations

import math
import random
import statistics
from fractions import Fraction
from itertools import islice

import pytest

from benchmarks.fusion.results import Results, estimate
from benchmarks.fusion.skills import SKILLS, Task, distinct, score, split_of, tasks, value

COUNTDOWN = Task("countdown", "make 11 of 2 4 5", "2+4+5")
SORT = Task("sort", "sort owl ant fox", "ant fox owl")
UNITS = Task("units", "35 cm in mm", "350 mm")


@pytest.mark.parametrize("skill", SKILLS)
def test_the_reference_answer_to_every_prompt_is_worth_one(skill):
    for task in islice(tasks(skill, "train", random.Random(0)), 300):
        assert score(task, task.answer) == 1


def test_the_reference_answers_are_right_by_arithmetic_done_apart():
    for task in distinct("test", 60, random.Random(1)):
        _, *words = task.prompt.split()
        if task.skill == "countdown":
            assert eval(task.answer) == int(words[0])
            assert sorted(task.answer[::2]) == sorted(words[2:])
        elif task.skill in ("sort", "reverse"):
            assert task.answer.split() == (sorted(words) if task.skill == "sort" else words[::-1])
        else:
            number, unit = task.answer.split()
            metres = {"mm": 1, "cm": 10, "dm": 100, "m": 1000, "km": 1000000, "g": 1, "kg": 1000, "ml": 1}
            metres |= {"cl": 10, "dl": 100, "l": 1000}
            assert unit == words[-1]
            assert Fraction(number) * metres[unit] == int(task.prompt.split()[0]) * metres[words[0]]


@pytest.mark.parametrize(
    ("task", "from_best_to_worst"),
    [
        (COUNTDOWN, ["2+4+5", "2*4+5", "2*4*5", "2+4+4", "9", "2 + 4", ""]),
        (SORT, ["ant fox owl", "ant owl fox", "ant ant ant", "sow", ""]),
        (UNITS, ["350 mm", "350 cm", "35", ""]),
        (UNITS, ["350 mm", "3500 mm", "1 mm"]),
        (Task("units", "35 mm in cm", "3.5 cm"), ["3.5 cm", "3.4 cm", "35 mm"]),
    ],
)
def test_an_answer_that_is_nearer_is_worth_more(task, from_best_to_worst):
    worth = [score(task, answer) for answer in from_best_to_worst]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] == 1 > worth[1] > worth[-1]


@pytest.mark.parametrize("answer", ["5+4+2", "4+2+5"])
def test_any_expression_of_the_numbers_solves_the_puzzle(answer):
    assert score(COUNTDOWN, answer) == 1


@pytest.mark.parametrize("answer", ["2+4+5+0", "11", "1+1+9", "2+4+5 ", "__import__('os')", "9**9**9", "2+4+5=11"])
def test_an_expression_of_other_numbers_or_no_expression_does_not_solve_it(answer):
    assert (score(COUNTDOWN, answer) == 1) == (answer.strip() == "2+4+5")


def test_expressions_are_worth_what_python_says():
    rng = random.Random(2)
    for _ in range(500):
        expression = "".join(f"{rng.randint(1, 99)}{rng.choice('+-*')}" for _ in range(4)) + "7"
        assert value(expression) == eval(expression)


def test_no_prompt_is_in_two_splits_and_every_split_has_every_skill():
    by_split = {split: distinct(split, 40, random.Random(0)) for split in ("test", "validation", "train")}
    for split, found in by_split.items():
        assert {task.skill for task in found} == set(SKILLS)
        assert len({task.prompt for task in found}) == len(found) == 40 * len(SKILLS)
        assert all(split_of(task.prompt) == split for task in found)


def test_the_interval_of_a_mean_is_student_s():
    # n = 5: t(4) is 2.776; s of 1..5 is sqrt(2.5).
    assert estimate([1, 2, 3, 4, 5]) == pytest.approx((3, 2.776 * math.sqrt(2.5 / 5), 5))
    assert math.isnan(estimate([7.0]).half)
    assert not estimate([7.0]).excludes_zero


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, hits, tries = random.Random(3), 0, 4000
    for _ in range(tries):
        found = estimate([rng.gauss(0, 1) for _ in range(4)])
        hits += not found.excludes_zero
    # 4 standard deviations of the count around 95 %.
    assert abs(hits / tries - 0.95) < 4 * math.sqrt(0.95 * 0.05 / tries)


def records(values: dict[str, list[float]]) -> Results:
    """One seed a value: that share of 10 held-out prompts of each skill is solved."""
    return Results(
        [
            {"seed": seed, "arm": arm, "solved": {name: [1] * int(v * 10) + [0] * int(10 - v * 10) for name in SKILLS}}
            for arm, shares in values.items()
            for seed, v in enumerate(shares)
        ]
    )


def test_a_gain_is_paired_within_seeds():
    results = records({"dpo": [0.1, 0.5, 0.9], "wrpo": [0.2, 0.6, 1.0]})
    gain = results.gain("wrpo", "dpo")
    assert gain is not None
    assert gain.mean == pytest.approx(10)
    assert gain.half == pytest.approx(0, abs=1e-9)  # the seeds differ by 40 points and the gains by nothing
    mean = results.mean("dpo")
    assert mean is not None
    assert mean.mean == pytest.approx(50)
    assert mean.half == pytest.approx(4.303 * statistics.stdev([10, 50, 90]) / math.sqrt(3))


def test_a_seed_that_lacks_an_arm_is_left_out_of_its_gain():
    gain = records({"dpo": [0.1, 0.5, 0.9], "wrpo": [0.2, 0.6]}).gain("wrpo", "dpo")
    assert gain is not None
    assert gain.seeds == 2
    assert records({"dpo": [0.1]}).gain("wrpo", "dpo") is None
