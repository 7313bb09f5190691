"""python -m wrpo.demo [--out FOLDER] [--seed N] [--steps N] [--alpha A] [--ties source|drop] [--quick]

Fine-tunes SmolLM2-135M-Instruct with WRPO on this machine, in a few minutes on two CPU cores:

1. The model answers prompts that training never sees; verifiers judge the answers.
2. WRPO on the triples beside this file: an expert's answer, the model's own best and its own worst; where the model's
   are all worth the same, the expert's and one of them.
3. The trained model answers the same prompts; both are shown side by side.

`skills.py` has the prompts and verifiers, `sources.py` the experts, and `make_triples.py` made the triples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this disk; do not ask the hub first

import torch
from transformers import ProgressCallback, set_seed

from wrpo import WRPOConfig, WRPOTrainer
from wrpo.data import load_examples, tokenize_examples
from wrpo.rows.json_lines import write_json_lines
from wrpo.user_error import UserError

from . import model as demo_model
from .make_triples import shipped_rows
from .report import Judged, answer_rows, draw_bars, judge, side_by_side, summary, table
from .skills import SKILLS, tasks

STEPS = 30
BATCH = 8  # rows a step: 24 sequences where all are triples
ALPHA = 0.5
BETA = 0.1
LEARNING_RATE = 3e-5


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0 done, 2 something the user can put right."""
    options = parse(arguments)
    logger = logging.getLogger("wrpo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the data are known to be good
    try:
        run(options)
    except UserError as error:
        print(f"wrpo.demo: {error}", file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m wrpo.demo", description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write (default: demo-output)")
    parser.add_argument("--seed", type=int, default=42, help="of the order of the triples (default: 42)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument(
        "--alpha", type=float, default=ALPHA, help=f"experts' share at the end (default: {ALPHA}; 0: DPO)"
    )
    parser.add_argument(
        "--ties", choices=("source", "drop"), default="drop", help="rows where the model's answers tie (default: drop)"
    )
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts a skill (default: 20)")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: 2 small steps, 1 prompt a skill")
    options = parser.parse_args(arguments)
    options.batch = BATCH
    if options.quick:
        options.steps, options.batch, options.prompts = 2, 2, 1
    return options


def run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    set_seed(options.seed)
    print("Loading SmolLM2-135M-Instruct (about 15 s) ...", flush=True)
    model, tokenizer = demo_model.load()
    bf16 = demo_model.faster_in_bf16()
    asked = [task for skill in SKILLS for task in tasks(skill, held_out=True)[: options.prompts]]

    def held_out(title: str) -> list[Judged]:
        said = demo_model.answers(model, tokenizer, [task.prompt for task in asked], title=title, bf16=bf16)
        return judge(asked, [greedy for (greedy,) in said])

    before = held_out("answers before")
    trainer = open_trainer(model, tokenizer, options, bf16)
    trainer.train()
    after = held_out("answers after")
    trainer.save_model(str(options.out / "model"))
    draw_bars(before, after, options.out / "before_after.png")
    write_metrics(options, before, after, bf16, time.perf_counter() - started)
    write_answers(options, before, after)
    print(f"\n{side_by_side(before, after)}\n{table(before, after)}\n")
    say_where(options.out, time.perf_counter() - started)
    if options.quick:
        print("\nIt runs. Two small steps are too few to learn anything: leave out --quick for answers that improve.")


def open_trainer(model: Any, tokenizer: Any, options: argparse.Namespace, bf16: bool) -> WRPOTrainer:
    """The library's trainer on the shipped rows; its reference pass happens here."""
    config = WRPOConfig(
        output_dir=str(options.out),
        max_steps=options.steps,
        alpha=options.alpha,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=1,
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    # No more than are trained on: the reference pass goes through every row that it is given.
    needed = shipped_rows(ties=options.ties == "source")[: options.steps * options.batch]
    rows = tokenize_examples(load_examples(needed), tokenizer)
    trainer = WRPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer


class Bar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, instead of a line of numbers a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_description("training")
            won = f"{logs['rewards/accuracies']:.2f}"
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", pairs_won=won, alpha=f"{logs['alpha']:.2f}")


def write_metrics(
    options: argparse.Namespace, before: list[Judged], after: list[Judged], bf16: bool, seconds: float
) -> None:
    """Adds what the demo measured to the log of the training, which the trainer has written."""
    path = options.out / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["before"], metrics["after"] = summary(before), summary(after)
    metrics["settings"] = {
        "seed": options.seed,
        "steps": options.steps,
        "alpha": options.alpha,
        "ties": options.ties,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "batch": options.batch,
        "bf16": bf16,
        "threads": torch.get_num_threads(),
    }
    metrics["seconds"] = round(seconds, 1)
    path.write_text(json.dumps(metrics, indent=1, ensure_ascii=False))


def write_answers(options: argparse.Namespace, before: list[Judged], after: list[Judged]) -> None:
    """Every held-out answer as `wrpo eval` reads it; runs with other seeds are other samples of one model."""
    for name, judged, model in (("before", before, "before"), ("after", after, f"ties {options.ties}")):
        write_json_lines(options.out / f"{name}.jsonl", answer_rows(judged, model, options.seed))


def say_where(folder: Path, seconds: float) -> None:
    print(f"{seconds:.0f} s. Written:")
    for name, what in {
        "model": "the trained model: AutoModelForCausalLM.from_pretrained(...) and AutoTokenizer load it",
        "before_after.png": "the table as a picture",
        "training_curves.png": "loss, rewards and alpha over the steps",
        "metrics.json": "every number above, every step",
        "after.jsonl": "every held-out answer, for wrpo eval; before.jsonl: those before training",
    }.items():
        if (folder / name).exists():
            print(f"  {folder / name}  {what}")


if __name__ == "__main__":
    sys.exit(main())
