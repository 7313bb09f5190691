"""python -m benchmarks.whole_steps [--model NAME] [--prompt 400 --response 100] [--rounds 9] [--quick] [--draw CSV]

What a user feels: whole optimizer steps of real trainers, in tokens a second and in peak memory.

    triples   `WRPOTrainer` as it comes, the same in padded rows, and the same on full logits
    pairs     these beside TRL's `DPOTrainer` as it comes, on the same pairs

Tokens are those of padded rows without the padding, so that a prompt counts once for each answer however often it is
computed. Without `--prompt` and `--response` the rows are the model's own (`suite/training_models.py`).

Each contestant trains in a process of its own. They take turns, one step each a round, so that a slow minute of a
shared machine hits all alike; the first round, which allocates, is not counted, but in it all must find the same loss.
Figures are medians over the rounds with the interval that covers the median with at least 95 % (order statistics, no
assumption about how times are spread). Writes a dated CSV and a picture of the pairs; `--draw` draws that of a CSV
again.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.suite import dated_table
from benchmarks.suite.flags import whole_number
from benchmarks.suite.step_figures import Figure, draw
from benchmarks.suite.training_contestants import CONTESTANTS, Setting, serve, why_not
from benchmarks.suite.training_contestants import NAMES as TRAINERS
from benchmarks.suite.training_models import NAMES
from wrpo.user_error import UserError

BATCH = {"SmolLM2-135M": 4, "Llama": 1, "Llama-1B": 4, "tiny": 2}  # rows a step
# The loss is a function of margins of order 1 that are sums of hundreds of log-probs of order 10 times BETA = 0.01:
# 0.01 * 500 * 10 * 2^-24 * a few roundings each; in bfloat16 a layout moves a log-prob by 0.03 at random.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 3e-2}
PATIENCE = 900.0  # seconds for one step, or for loading


class Contestant:
    """A trainer in a process of its own."""

    def __init__(self, name: str, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.name, self.layout, self.taken = name, "", []
        self.connection, theirs = context.Pipe()
        arguments = (theirs, name, setting, torch.get_num_threads())
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def said(self) -> object:
        """The next thing it says.

        Raises:
            UserError: it ended, or says nothing for `PATIENCE`.
        """
        try:
            if self.connection.poll(PATIENCE):
                return self.connection.recv()
        except EOFError:
            raise UserError(f"{self.name} ended before its time; its error is above") from None
        raise UserError(f"{self.name} says nothing for {PATIENCE:.0f} s; free the machine, or choose a smaller --model")

    def step(self) -> None:
        self.connection.send("step")
        self.taken.append(self.said())

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def compared(setting: Setting, wanted: Sequence[str]) -> list[Figure]:
    """Figures of those of the contestants that can take part; says why the others cannot."""
    names, title = [], f"{setting.model}, {setting.comparison}"
    for name in wanted:
        if why := why_not(name, setting.comparison):
            print(f"{title}: {name} is skipped: {why}")
        else:
            names.append(name)
    contestants = [Contestant(name, setting) for name in names]
    try:
        for contestant in contestants:
            contestant.layout = contestant.said()
        for number in tqdm(range(setting.steps), desc=title, unit="round"):
            for contestant in contestants:
                contestant.step()
            if not number:
                check_same_work(contestants, SAME_LOSS[setting.dtype])
        return list(figures(setting, contestants))
    finally:
        for contestant in contestants:
            contestant.end()


def check_same_work(contestants: list[Contestant], tolerance: float) -> None:
    """Raises UserError unless all had the same tokens and found the same loss in their first step."""
    first = {contestant.name: contestant.taken[0] for contestant in contestants}
    losses, tokens = [step.loss for step in first.values()], {step.tokens for step in first.values()}
    if len(tokens) > 1 or not max(losses) - min(losses) <= tolerance:
        found = ", ".join(f"{name}: loss {step.loss:.6f} of {step.tokens} tokens" for name, step in first.items())
        raise UserError(f"the contestants do not do the same work, so there are no figures: {found}")


def figures(setting: Setting, contestants: list[Contestant]):
    prompt, response = setting.lengths or (0, 0)
    of = (setting.model, setting.comparison, prompt, response, setting.dtype)
    rates = {c.name: [step.tokens / step.seconds for step in c.taken[1:]] for c in contestants}
    fused = rates[contestants[0].name]
    for contestant in contestants:
        own = rates[contestant.name]
        slower = [a / b for a, b in zip(fused, own, strict=True)]
        tokens = statistics.mean(step.tokens for step in contestant.taken[1:])
        spans = (*median_interval(own), *median_interval(slower))
        peak, loss = contestant.said(), contestant.taken[0].loss
        yield Figure(*of, contestant.name, contestant.layout, len(own), tokens, *spans, peak, loss)


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median, and the narrowest pair of order statistics that covers the true median with probability >= `level`.

    x_(k) and x_(n+1-k) miss it with probability 2 P(Binomial(n, 1/2) < k). Fewer than six values cannot reach 95 %:
    then the pair is the smallest and the largest.
    """
    ordered, n = sorted(values), len(values)
    k, missed = 1, 2 * 0.5**n
    while (missed := missed + 2 * math.comb(n, k) * 0.5**n) <= 1 - level:
        k += 1
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def line(f: Figure) -> str:
    rate = f"{f.tokens_s:8.1f} tokens/s [{f.tokens_s_low:.1f}, {f.tokens_s_high:.1f}]"
    slower = f"fused is {f.times_fused:.3f} times as fast [{f.times_fused_low:.3f}, {f.times_fused_high:.3f}]"
    lengths = f", {f.prompt} + {f.response}" if f.prompt else ""
    head = f"{f.model + ', ' + f.comparison + lengths:<24} {f.contestant:<16} {f.layout:<7}"
    return f"{head} {rate}  {slower}  peak {f.peak_mib:7.0f} MiB  loss of the first step {f.first_loss:.6f}"


def add_work(parser: argparse.ArgumentParser) -> None:
    length = {"type": whole_number, "action": "append", "default": []}
    parser.add_argument("--comparison", choices=CONTESTANTS, action="append", help="repeatable (default: all)")
    only = "only these beside `fused`; repeatable (default: of each comparison as above)"
    parser.add_argument("--contestant", choices=TRAINERS, action="append", help=only)
    parser.add_argument("--prompt", **length, help="tokens of every prompt; repeatable, each with its --response")
    parser.add_argument("--response", **length, help="tokens of every answer")
    parser.add_argument("--batch", type=whole_number, help="rows a step (default: by the model)")
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help=f"default: {dtype}")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor: for a busy machine, one thread"
    )


def contestants_of(args: argparse.Namespace, comparison: str) -> list[str]:
    return list(dict.fromkeys(["fused", *(args.contestant or CONTESTANTS[comparison])]))


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Raises UserError for what does not go together."""
    if len(args.prompt) != len(args.response):
        raise UserError(f"expected a --response for each --prompt, got {len(args.response)} for {len(args.prompt)}")
    if args.cpu_time and (torch.cuda.is_available() or torch.get_num_threads() > 1):
        raise UserError(
            "--cpu-time counts threads that wait for each other, and no GPU: expected OMP_NUM_THREADS=1 on a CPU"
        )
    models = ["tiny"] if args.quick else args.model or ["SmolLM2-135M", "Llama"]
    steps = 1 + (3 if args.quick else args.rounds)
    clock = "process_time" if args.cpu_time else "perf_counter"
    lengths = list(zip(args.prompt, args.response, strict=True)) or [None]
    return [
        Setting(model, comparison, args.batch or BATCH[model], steps, some, args.dtype, clock)
        for model in models
        for some in lengths
        for comparison in args.comparison or CONTESTANTS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=NAMES, help="repeatable (default: SmolLM2-135M and Llama)")
    parser.add_argument(
        "--rounds", type=whole_number, default=9, help="steps of each contestant that count (default: 9)"
    )
    parser.add_argument("--quick", action="store_true", help="see it run: three rounds of a tiny model")
    dated_table.add_out(parser)
    dated_table.add_draw(parser, Figure)
    add_work(parser)
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return 0
    facts = dated_table.facts_of("benchmarks.whole_steps", "cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Figure] = []
    try:
        for setting in settings_of(args):
            rows += (found := compared(setting, contestants_of(args, setting.comparison)))
            print(*map(line, found), sep="\n", flush=True)
    except UserError as error:
        print(f"benchmarks.whole_steps: {error}", file=sys.stderr)
        return 2
    path = dated_table.write(rows, facts, args.out, "whole_steps_quick" if args.quick else "whole_steps")
    draw(path.with_suffix(".png"), facts, rows)
    print(f"wrote {path} and its picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
