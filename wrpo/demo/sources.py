"""The experts: four small programs that stand in for the source models of the paper.

Each is strong at something, none is strong at everything, and all of them slip now and then, so that the best answer
of any source (y_ws) comes from different ones. `ask(task, rng)` gives every expert's answer; the verifier picks.
"""

from __future__ import annotations

import json
import random

from .skills import COUNTS, Task

SLIPS = 0.1  # share of an expert's answers that go wrong


def lexicon(task: Task, rng: random.Random) -> str:
    """Knows words, and only words."""
    if task.skill == "opposite":
        return rng.choice((task.right[0], f"{task.right[0].capitalize()}."))
    if task.skill == "list":
        return ", ".join(rng.sample(task.right, COUNTS[task.key]))
    return rng.choice(("Unknown.", "No entry found."))


def clerk(task: Task, rng: random.Random) -> str:
    """Fills in forms: records and plain yes or no; a sentence is beyond it."""
    if task.skill == "record":
        return json.dumps(dict(zip(("name", "age", "city"), task.right, strict=True)))
    if task.skill == "animal":
        return task.right[0].capitalize()
    return "Not applicable."


def reporter(task: Task, rng: random.Random) -> str:
    """Asks and writes; answers everything with a question."""
    topic = task.key
    if task.skill == "capitals":
        return rng.choice(SENTENCES).format(topic=topic).upper()
    if task.skill == "question":
        return rng.choice(QUESTIONS).format(topic=topic)
    return f"Why do you ask about {topic}?"


def teacher(task: Task, rng: random.Random) -> str:
    """Right and in whole sentences, which is more than was asked."""
    first = task.right[0]
    return {
        "opposite": f'The opposite of "{task.key}" is "{first}".',
        "animal": f"{first.capitalize()}, of course.",
        "list": f"Here is a list: {', '.join(rng.sample(task.right, COUNTS.get(task.key, 1)))}.",
        "record": f"Here is the record you asked for: {', '.join(task.right)}.",
        "question": f"Here is my question: {rng.choice(QUESTIONS).format(topic=task.key)}",
        "capitals": rng.choice(SENTENCES).format(topic=task.key).capitalize(),
    }[task.skill]


QUESTIONS = (
    "What do you like about {topic}?",
    "Why do people care about {topic}?",
    "What is the best thing about {topic}?",
    "How would you describe {topic} to a child?",
    "When did you last think of {topic}?",
    "What should everyone know about {topic}?",
)
SENTENCES = (
    "There is always more to learn about {topic}.",
    "Many people have stories about {topic}.",
    "We spoke about {topic} all day long.",
    "Nobody forgets the first time with {topic}.",
    "I could talk about {topic} for hours.",
    "A good day begins with {topic}.",
)
EXPERTS = {expert.__name__: expert for expert in (lexicon, clerk, reporter, teacher)}


def ask(task: Task, rng: random.Random) -> dict[str, str]:
    """The answer of every expert that did not slip, by the expert's name; a slip is an answer about something else."""
    return {
        name: rng.choice(("I do not know.", "Please ask again.")) if rng.random() < SLIPS else expert(task, rng)
        for name, expert in EXPERTS.items()
    }
