"""python examples/fuse/make_data.py

Writes the small files beside it, from the demo's skills and experts (`wrpo.demo`):

    prompts.jsonl     training prompts, some of each skill
    held_out.jsonl    prompts about words that no training prompt mentions
    experts.jsonl     four experts' answers to the training prompts, as `wrpo sample` would write them; an expert is a
                      small program that stands in for a source model
"""

from __future__ import annotations

import random
from pathlib import Path

from wrpo.demo.skills import SKILLS, Task, tasks
from wrpo.demo.sources import ask
from wrpo.rows.json_lines import write_json_lines

FOLDER = Path(__file__).parent
TRAINING, HELD_OUT = 14, 8  # prompts of each skill


def prompts(count: int, held_out: bool) -> list[tuple[Task, dict]]:
    side = "held-out" if held_out else "training"
    return [
        (task, {"prompt_id": f"{side}-{skill}-{number}", "prompt": task.prompt, "skill": skill})
        for skill in SKILLS
        for number, task in enumerate(tasks(skill, held_out=held_out)[:count])
    ]


def expert_answers(asked: list[tuple[Task, dict]]) -> list[dict]:
    rng = random.Random(0)
    return [
        row | {"model": expert, "sample": 0, "response": answer}
        for task, row in asked
        for expert, answer in ask(task, rng).items()
    ]


if __name__ == "__main__":
    training = prompts(TRAINING, held_out=False)
    write_json_lines(FOLDER / "prompts.jsonl", (row for _, row in training))
    write_json_lines(FOLDER / "held_out.jsonl", (row for _, row in prompts(HELD_OUT, held_out=True)))
    write_json_lines(FOLDER / "experts.jsonl", expert_answers(training))
