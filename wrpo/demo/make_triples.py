"""python -m wrpo.demo.make_triples      (needs the demo's model; many minutes on 2 cores)

Writes triples.jsonl, what the demo trains on: asks the model for five answers to each training prompt at temperature
0.8 and top-p 0.95, asks the experts of `sources.py` for theirs, lets the verifiers of `skills.py` score all of them,
and lets `wrpo.building` choose: the best answer of any expert, the model's own best and its worst. Prompts on which
the model's answers are all worth the same give no triple, nor do those where every expert slipped below the model.

The file that is shipped was sampled the same way by an earlier state of this code and scored by the present one, so
this command makes one like it, not the same; see docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from wrpo.building import BuildSettings, build_rows

from . import model as demo_model
from .skills import SKILLS, Task, score, tasks
from .sources import ask

PATH = Path(__file__).with_name("triples.jsonl")


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
    built = build_rows(rows, BuildSettings(sft_share=0, seed=options.seed))
    triples = [triple for triple in built.triples if triple["source_reward"][0] >= triple["target_reward"]]
    options.output.write_text("".join(json.dumps(triple, ensure_ascii=False) + "\n" for triple in triples), "utf-8")
    print(built.report)
    print(f"{len(triples)} triples in which an expert is at least as good as the model")
    print(f"triples  {options.output}")


if __name__ == "__main__":
    main()
