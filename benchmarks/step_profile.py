"""python -m benchmarks.step_profile [--model NAME] [--prompt 400 --response 100] [--contestant NAME] [--dtype float32]

Where the time of one optimizer step goes, for the trainers of `benchmarks.whole_steps`: milliseconds and share of

    products     of the body and of plain heads (mm, addmm, bmm)
    attention    scaled dot products
    head         the fused log-probs and their loss, products among them
    softmax      of logits and of attention that is computed plainly
    optimizer    AdamW, and the gradients' norm and clipping
    fill         zeros: gradients of embeddings, buffers
    elementwise  norms, rotary positions, gates, residuals, casts: all that reads and writes activations
    other        the rest, Python among it

Times are of the operations themselves (torch.profiler), the median over the steps that count; on a GPU they are of its
kernels. Contestants run one after another, each in a process of its own: compare shares, not contestants, for which
`benchmarks.whole_steps` takes turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PrinterCallback, TrainerCallback

from benchmarks.suite.flags import whole_number
from benchmarks.suite.training_contestants import NAMES as TRAINERS
from benchmarks.suite.training_contestants import Setting, quiet, trainer_of, why_not
from benchmarks.suite.training_models import NAMES, work_of
from wrpo.training.start_report import StartReport

# The first that is found in an operation's name; an op of ours counts with all that it calls.
PARTS = {
    "attention": ("scaled_dot_product", "flash_attn", "flex_attention"),
    "products": ("mm", "mkldnn_linear"),
    "softmax": ("softmax", "logsumexp"),
    "optimizer": ("adam", "_foreach", "linalg_vector_norm"),
    "fill": ("fill_", "zero_"),
    "elementwise": (
        *("mul", "add", "sub", "div", "neg", "exp", "pow", "rsqrt", "silu", "gelu", "sigmoid", "lt", "where", "masked"),
        *("copy_", "cat", "index", "embedding", "gather", "scatter", "sum", "mean", "amax"),
    ),
}
ORDER = ("products", "attention", "head", "softmax", "optimizer", "fill", "elementwise", "other")
WARM_UP = 2  # steps that allocate


def part_of(name: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in name.lower() for word in words)), "other")


class ProfiledSteps(TrainerCallback):
    """Milliseconds of each part, a `Counter` a step."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.seen = 0

    def on_step_begin(self, *_args: Any, **_options: Any) -> None:
        self.seen += 1
        self.profile = profile() if self.seen > WARM_UP else None
        if self.profile:
            self.profile.__enter__()
        self.start = time.perf_counter()

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - self.start)
        if self.profile:
            self.profile.__exit__(None, None, None)
            self.steps.append(parts(self.profile, taken))


def parts(profiled: profile, taken: float) -> Counter[str]:
    """Milliseconds of each part of a step that took `taken` of them."""
    on_device = ProfilerActivity.CUDA in profiled.activities
    found: Counter[str] = Counter()
    for event in profiled.events():
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        within, inside = event.cpu_parent, "wrpo" in event.name.lower()
        while within is not None and not inside:
            inside, within = "wrpo" in within.name.lower(), within.cpu_parent
        found["head" if inside else part_of(event.name)] += own / 1e3
    found["other"] += max(0.0, taken - sum(found.values()))
    return found


def profile_in_process(connection: Any, contestant: str, setting: Setting, threads: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, quiet():
        work = work_of(setting.model, setting.batch * setting.steps, pairs=True, lengths=setting.lengths)
        trainer = trainer_of(contestant, setting, *work, folder)
        for teller in (PrinterCallback, StartReport):
            trainer.remove_callback(teller)
        trainer.add_callback(steps := ProfiledSteps())
        trainer.train()
    connection.send({part: statistics.median(step[part] for step in steps.steps) for part in ORDER})


def profiled(contestant: str, setting: Setting) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=profile_in_process, args=(theirs, contestant, setting, torch.get_num_threads()), daemon=True
    )
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"benchmarks.step_profile: {contestant} ended before its time; its error is above") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="SmolLM2-135M")
    parser.add_argument("--prompt", type=whole_number, default=400, help="tokens of every prompt (default: 400)")
    parser.add_argument("--response", type=whole_number, default=100, help="tokens of every answer (default: 100)")
    parser.add_argument("--batch", type=whole_number, default=1, help="pairs a step (default: 1)")
    parser.add_argument("--steps", type=whole_number, default=3, help="steps that count (default: 3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contestant", choices=TRAINERS, action="append", help="repeatable (default: fused)")
    args = parser.parse_args()
    lengths = (args.prompt, args.response)
    setting = Setting(args.model, "pairs", args.batch, WARM_UP + args.steps, lengths, args.dtype)
    print(
        f"{args.model}, {args.prompt} + 2 x {args.response}, {args.dtype}, {torch.get_num_threads()} threads, ms a step"
    )
    print(f"{'':<18}" + "".join(f"{part:>15}" for part in (*ORDER, "all")))
    for name in args.contestant or ["fused"]:
        if why := why_not(name, "pairs"):
            print(f"{name:<18} is skipped: {why}")
            continue
        found = profiled(name, setting)
        whole = sum(found.values())
        cells = [f"{found[part]:7.0f} ({found[part] / whole:4.0%})" for part in ORDER]
        print(f"{name:<18}" + "".join(f"{cell:>15}" for cell in cells) + f"{whole:15.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
