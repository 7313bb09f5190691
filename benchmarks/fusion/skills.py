"""The skills: what is asked, one right answer, and what any answer is worth.

    countdown  make 11 of 2 4 5           2+4+5          an expression of these numbers, each once
    sort       sort owl ant fox           ant fox owl
    reverse    reverse owl ant fox        fox ant owl
    units      35 cm in mm, 35 mm in cm   350 mm, 3.5 cm

Scores are graded from 0 to 1, because a preference needs a better and a worse answer even where neither is right; 1 is
given for a right answer and nothing else. A prompt belongs to one of three splits by its text alone, so that no model,
in whatever stage of training, ever meets a prompt of another split.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

SPLITS = ("test", "validation", "train", "train", "train", "train", "train", "train")  # by the prompt's checksum
WORDS = "ant bat bee cat cow dog elk fly fox gnu hen jay kid owl pig ram rat sow yak ape".split()
UNITS = {
    ("cm", "mm"): 10, ("dm", "cm"): 10, ("m", "cm"): 100, ("m", "mm"): 1000, ("km", "m"): 1000, ("kg", "g"): 1000,
    ("l", "dl"): 10, ("l", "cl"): 100, ("l", "ml"): 1000,
}  # fmt: skip


class Task(NamedTuple):
    """One prompt and one right answer to it."""

    skill: str
    prompt: str
    answer: str


def split_of(prompt: str) -> str:
    return SPLITS[zlib.crc32(prompt.encode()) % len(SPLITS)]


def tasks(skill: str, split: str, rng: random.Random) -> Iterator[Task]:
    """Random tasks of one split, without end; a prompt may come again."""
    while True:
        prompt, answer = SKILLS[skill].ask(rng)
        if split_of(prompt) == split:
            yield Task(skill, prompt, answer)


def distinct(split: str, each: int, rng: random.Random) -> list[Task]:
    """`each` different tasks of every skill, shuffled."""
    found = [task for skill in SKILLS for task in _distinct(skill, split, each, rng)]
    rng.shuffle(found)
    return found


def _distinct(skill: str, split: str, count: int, rng: random.Random) -> list[Task]:
    by_prompt: dict[str, Task] = {}
    for task in tasks(skill, split, rng):
        by_prompt.setdefault(task.prompt, task)
        if len(by_prompt) == count:
            break
    return list(by_prompt.values())


def score(task: Task, said: str) -> float:
    """What an answer is worth, from 0 to 1; only 1 counts as solved."""
    return SKILLS[task.skill].score(task, said.strip())


# -- units of measure -------------------------------------------------------------------------------------------------


def right_digits(said: str, right: str) -> float:
    """Share of the digits of the longer number on which both agree, place by place from the left."""
    agree = sum(a == b for a, b in zip(said, right, strict=False))
    return agree / max(len(said), len(right))


def ask_units(rng: random.Random) -> tuple[str, str]:
    (large, small), factor = rng.choice(list(UNITS.items()))
    number = rng.randint(1, 999)
    if rng.random() < 0.5:
        return f"{number} {large} in {small}", f"{number * factor} {small}"
    return f"{number} {small} in {large}", f"{number / factor:.6g} {large}"


def score_units(task: Task, said: str) -> float:
    """The right unit behind a wrong number is worth 0.2, the digits that are right up to 0.4."""
    found = re.fullmatch(r"([0-9.]+) ([a-z]+)", said)
    if found is None:
        return 0.0
    number, unit = task.answer.split()
    return 1.0 if said == task.answer else 0.2 * (found[2] == unit) + 0.4 * right_digits(found[1], number)


# -- the countdown puzzle ---------------------------------------------------------------------------------------------


def ask_countdown(rng: random.Random) -> tuple[str, str]:
    while True:
        numbers = [str(rng.randint(1, 9)) for _ in range(3)]
        first, second = rng.choices("+-", k=2)
        expression = f"{numbers[0]}{first}{numbers[1]}{second}{numbers[2]}"
        if value(expression) > 0:
            return f"make {value(expression)} of {' '.join(numbers)}", expression


def value(expression: str) -> int:
    """Of numbers joined by + - *, products first."""
    terms = re.findall(r"([+-]?)([0-9]+(?:\*[0-9]+)*)", expression)
    return sum((-1 if sign == "-" else 1) * _product(term) for sign, term in terms)


def _product(term: str) -> int:
    result = 1
    for factor in term.split("*"):
        result *= int(factor)
    return result


def score_countdown(task: Task, said: str) -> float:
    """An expression is worth 0.1; up to 0.3 for the right numbers, and with all of them up to 0.2 for coming close."""
    if not re.fullmatch(r"[0-9]{1,3}([+*-][0-9]{1,3}){0,5}", said):
        return 0.0
    wanted, *numbers = re.findall("[0-9]+", task.prompt)
    used = re.findall("[0-9]+", said)
    common = (Counter(used) & Counter(numbers)).total()
    if common < max(len(used), len(numbers)):
        return 0.1 + 0.3 * common / max(len(used), len(numbers))
    gap = abs(value(said) - int(wanted))
    return 1.0 if gap == 0 else 0.4 + 0.2 / (1 + gap)


# -- words in order ---------------------------------------------------------------------------------------------------


def ask_sort(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 3)
    return f"sort {' '.join(words)}", " ".join(sorted(words))


def ask_reverse(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 3)
    return f"reverse {' '.join(words)}", " ".join(reversed(words))


def score_words(task: Task, said: str) -> float:
    """A wrong order of the right words is worth 0.2; up to 0.4 for words in their places."""
    if said == task.answer:
        return 1.0
    words, right = said.split(), task.answer.split()
    in_place = sum(a == b for a, b in zip(words, right, strict=False)) / max(len(words), len(right))
    return 0.2 * (sorted(words) == sorted(right)) + 0.4 * in_place


class Skill(NamedTuple):
    """ask(rng) -> prompt and right answer; score(task, answer) -> [0, 1]."""

    ask: Callable[[random.Random], tuple[str, str]]
    score: Callable[[Task, str], float]


SKILLS = {
    "countdown": Skill(ask_countdown, score_countdown),
    "sort": Skill(ask_sort, score_words),
    "reverse": Skill(ask_reverse, score_words),
    "units": Skill(ask_units, score_units),
}
