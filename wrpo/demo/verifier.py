"""The demo's skills as a reward: `wrpo score --verifier wrpo.demo.verifier:verify`."""

from __future__ import annotations

from functools import cache

from .skills import SKILLS, Task, score, tasks


def verify(prompt: str, response: str, row: dict) -> float:
    """What an answer to one of the demo's prompts is worth, 0 to 1; one that the length limit cut is worth nothing.

    Raises:
        ValueError: a prompt that is none of the demo's.
    """
    task = _tasks().get(prompt)
    if task is None:
        raise ValueError(f"not a prompt of the demo's skills: {prompt!r}")
    return 0.0 if row.get("finish_reason") == "length" else score(task, response)


@cache
def _tasks() -> dict[str, Task]:
    both = (tasks(skill, held_out=held_out) for skill in SKILLS for held_out in (False, True))
    return {task.prompt: task for side in both for task in side}
