"""Small skills whose answers a program can judge: what is asked, and what an answer is worth.

Each skill turns some of its words into training prompts and keeps the others for the test, so that a held-out prompt is
about things that training never mentioned. `score(task, answer)` is graded from 0 to 1, because a preference needs a
better and a worse answer even where neither is right; 1 is given for exactly what was asked and nothing else.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from . import words

HELD_OUT = 0.3  # share of each skill's words that training never sees
SPLIT_SEED = 2412


@dataclass(frozen=True)
class Task:
    """One prompt and what the verifier has to know about it.

    skill: key of `SKILLS`; prompt: the user's message; key: the word the prompt is about; right: what a right answer
    says (the opposite, yes or no, the category's members, the record's fields, the topic).
    """

    skill: str
    prompt: str
    key: str
    right: tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """tasks(words of one side of the split, rng) -> prompts; score(task, answer) -> [0, 1]."""

    subjects: list[str]
    tasks: Callable[[list[str], random.Random], list[Task]]
    score: Callable[[Task, str], float]


def tasks(skill: str, *, held_out: bool, seed: int = 0) -> list[Task]:
    """Every prompt of one side of the split, shuffled; the same for the same seed, on every machine."""
    subjects = sorted(SKILLS[skill].subjects)
    random.Random(f"{SPLIT_SEED} {skill}").shuffle(subjects)
    cut = round(len(subjects) * HELD_OUT)
    rng = random.Random(f"{seed} {skill} {held_out}")
    found = SKILLS[skill].tasks(subjects[:cut] if held_out else subjects[cut:], rng)
    rng.shuffle(found)
    return found


def score(task: Task, answer: str) -> float:
    """What the answer is worth, from 0 to 1; only 1 counts as solved."""
    return SKILLS[task.skill].score(task, answer.strip())


def spoken(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


# -- opposite: one word -----------------------------------------------------------------------------------------------


def opposite_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    pairs = [subject.split() for subject in subjects]
    return [Task("opposite", f'What is the opposite of "{a}"? Answer with one word.', a, (b,)) for a, b in pairs]


def score_opposite(task: Task, answer: str) -> float:
    """1 for the word alone, 0.5 and falling with each further word for the word among others, 0.1 for a wrong word."""
    said = spoken(answer)
    if task.right[0] not in said:
        return 0.1 if len(said) == 1 else 0.0
    return 1.0 if len(said) == 1 else 0.5 / (1 + max(0, len(said) - 6) / 6)


# -- animal: yes or no ------------------------------------------------------------------------------------------------


def animal_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    return [
        Task(
            "animal",
            f"Is {article(noun)} an animal? Answer yes or no only.",
            noun,
            ("yes" if noun in words.ANIMALS else "no",),
        )
        for noun in subjects
    ]


def score_animal(task: Task, answer: str) -> float:
    """1 for the right one of yes and no alone, 0.5 where more follows, 0.2 for the wrong one alone."""
    said = spoken(answer)
    if not said or said[0] not in ("yes", "no"):
        return 0.0
    if said[0] == task.right[0]:
        return 1.0 if len(said) == 1 else 0.5
    return 0.2 if len(said) == 1 else 0.0


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# -- list: so many things of a kind, separated by commas --------------------------------------------------------------

COUNTS = {"two": 2, "three": 3, "four": 4}


def list_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    return [
        Task(
            "list",
            f"Name {count} {kind}, separated by commas. Write nothing else.",
            count,
            words.CATEGORIES[kind],
        )
        for kind in subjects
        for count in COUNTS
    ]


def score_list(task: Task, answer: str) -> float:
    """1 for the right number of different members on one line; less by form, by count and by share of known members."""
    wanted, members = COUNTS[task.key], {member.lower() for member in task.right}
    items = [item.strip(" .").lower() for item in answer.split(",")]
    if "\n" in answer or any(not 1 <= len(item.split()) <= 3 for item in items):
        return 0.2 * min(1.0, len({*spoken(answer)} & members) / wanted)
    known = {item for item in items if item in members or item.removesuffix("s") in members}
    form = max(0.0, 1 - abs(len(items) - wanted) / wanted)
    return form * (0.2 + 0.8 * (len(known) / max(wanted, len(items))))


# -- record: three fields as JSON -------------------------------------------------------------------------------------

FACTS = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, is from {city}.",
    "I am {name} from {city} and I am {age}.",
)
PLACES = dict(zip(words.NAMES, words.TOWNS * 2, strict=False))


def record_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    found = []
    for name in subjects:
        for fact in rng.sample(FACTS, 2):
            age = str(rng.randint(20, 80))
            text = fact.format(name=name, age=age, city=PLACES[name])
            found.append(
                Task("record", f"Give name, age and city as JSON only: {text}", name, (name, age, PLACES[name]))
            )
    return found


def score_record(task: Task, answer: str) -> float:
    """1 for the object alone, 0.5 where text surrounds it, 0.1 for each right field of a wrong one."""
    wanted = dict(zip(("name", "age", "city"), task.right, strict=True))
    found = re.search(r"\{[^{}]*\}", answer)
    try:
        said = {str(k): str(v) for k, v in json.loads(found[0]).items()} if found else {}
    except json.JSONDecodeError:
        return 0.0
    if said == wanted:
        return 1.0 if found and found[0] == answer else 0.5
    return 0.1 * sum(said.get(k) == v for k, v in wanted.items())


# -- question: ask about a topic --------------------------------------------------------------------------------------

ASKING = set(
    "what why how when where who which do does did is are was were can could would should have has will".split()
)


def question_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    return [
        Task("question", f"Ask one short question about {topic}.", topic, (topic.split()[-1],)) for topic in subjects
    ]


def score_question(task: Task, answer: str) -> float:
    """1 for one question of 3 to 14 words that names the topic, 0.5 without the topic or with more, 0.2 with a ?."""
    said = spoken(answer)
    if "?" not in answer or not said:
        return 0.0
    alone = (
        answer.endswith("?")
        and len(re.findall(r"[.!?\n]", answer)) == 1
        and said[0].split("'")[0] in ASKING
        and 3 <= len(said) <= 14
    )
    named = any(word.startswith(task.right[0].rstrip("s")) for word in said)
    return 1.0 if alone and named else 0.5 if alone or (named and said[0].split("'")[0] in ASKING) else 0.2


# -- capitals: one sentence in capital letters ------------------------------------------------------------------------


def capitals_tasks(subjects: list[str], rng: random.Random) -> list[Task]:
    return [
        Task("capitals", f"Write a short sentence about {topic} in capital letters.", topic, (topic.split()[-1],))
        for topic in subjects
    ]


def score_capitals(task: Task, answer: str) -> float:
    """1 for one sentence of 4 to 14 words in capitals that names the topic; else half the share of capitals."""
    letters = [c for c in answer if c.isalpha()]
    said = spoken(answer)
    if not letters:
        return 0.0
    named = any(word.startswith(task.right[0].rstrip("s")) for word in said)
    alone = len(re.findall(r"[.!?\n]", answer.rstrip(".!?"))) == 0 and 4 <= len(said) <= 14
    share = sum(c.isupper() for c in letters) / len(letters)
    return 1.0 if share == 1 and alone and named else 0.5 * share


SKILLS = {
    "opposite": Skill(words.OPPOSITES, opposite_tasks, score_opposite),
    "animal": Skill(sorted({*words.ANIMALS, *words.THINGS}), animal_tasks, score_animal),
    "list": Skill(sorted(words.CATEGORIES), list_tasks, score_list),
    "record": Skill(words.NAMES, record_tasks, score_record),
    "question": Skill(words.TOPICS, question_tasks, score_question),
    "capitals": Skill(words.TOPICS, capitals_tasks, score_capitals),
}
