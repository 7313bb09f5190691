"""Candidates for tests, made from their rewards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path


def answers(prompt_id: str, **rewards: list[float]) -> list[dict]:
    """One candidate for each reward of each model; the response spells out which it is."""
    return [
        {
            "prompt_id": prompt_id,
            "prompt": f"question {prompt_id}",
            "model": model,
            "sample": sample,
            "response": f"{prompt_id}/{model}/{sample}",
            "reward": reward,
        }
        for model, scores in rewards.items()
        for sample, reward in enumerate(scores)
    ]


def many_answers(prompts: int, seed: int = 0) -> list[dict]:
    """Three sources and the target with three answers each; rewards in steps of 1/8, so that ties are common."""
    rng = random.Random(seed)
    models = ("big", "small", "third", "target")
    return [
        row
        for number in range(prompts)
        for row in answers(f"p{number}", **{model: [rng.randrange(9) / 8 for _ in range(3)] for model in models})
    ]


def write_lines(rows: Iterable[dict | str], path: Path) -> Path:
    """JSON lines; a string is written as it is."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path
