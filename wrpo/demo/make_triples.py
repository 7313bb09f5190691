"""python -m wrpo.demo.make_triples      (needs the demo's model; many minutes on 2 cores)

Writes triples.jsonl, what the demo trains on: asks the model for five answers to each training prompt at temperature
0.8 and top-p 0.95, asks the experts of `sources.py` for theirs, lets the verifiers of `skills.py` score all of them,
and lets `wrpo.building` choose: the best answer of any expert, the model's own best and its worst. Where the model's
answers are all worth the same, an expert that is clearly better makes a row with one of them (`--ties source` of
`wrpo build`); prompts on which every expert slipped below the model give none.

The samples depend on how the processor rounds: another one makes a file like the one that is shipped, not the same.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from wrpo.building import BuildSettings, build_rows
from wrpo.rows.json_lines import write_json_lines

from . import model as demo_model
from .skills import SKILLS, Task, score, tasks
from .sources import ask

PATH = Path(__file__).with_name("triples.jsonl")


def shipped_rows(*, ties: bool) -> list[dict]:
    """What triples.jsonl holds, in its order, which is random; without `ties` only rows with an answer of the model."""
    rows = [json.loads(line) for line in PATH.read_text("utf-8").splitlines()]
    return [row for row in rows if ties or "target_chosen" in row]


def candidates(task: Task, number: int, samples: list[demo_model.Answer], rng: random.Random) -> list[dict]:
    """Every answer to one prompt with its score; an answer that the length limit cut is worth nothing."""
    scored = [("target", k, a.text, 0.0 if a.cut else score(task, a.text)) for k, a in enumerate(samples)]
    scored += [(name, 0, text, score(task, text)) for name, text in ask(task, rng).items()]
    head = {"prompt_id": f"{task.skill}-{number}", "prompt": task.prompt}
    return [
        head | {"model": name, "sample": k, "response": text.strip(), "reward": reward}
        for name, k, text, reward in scored
        if text.strip()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=70, help="most prompts a skill (default: 70)")
    parser.add_argument("--samples", type=int, default=5, help="answers of the model to each prompt (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PATH)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, tokenizer = demo_model.load()
    asked = [task for skill in SKILLS for task in tasks(skill, held_out=False)[: options.prompts]]
    sampled = demo_model.answers(
        model,
        tokenizer,
        [task.prompt for task in asked],
        title="sampling",
        bf16=demo_model.faster_in_bf16(),
        samples=options.samples,
        batch_size=16,
    )
    rng = random.Random(options.seed)
    rows = [
        row for n, (task, said) in enumerate(zip(asked, sampled, strict=True)) for row in candidates(task, n, said, rng)
    ]
    built = build_rows(rows, BuildSettings(sft_share=0, seed=options.seed, ties="source"))
    kept = [row for row in built.triples if row["source_reward"][0] >= row.get("target_reward", 0)]
    write_json_lines(options.output, kept)
    print(built.report)
    print(f"{len(kept)} rows in which an expert is at least as good as the model")
    print(f"triples  {options.output}")


if __name__ == "__main__":
    main()
