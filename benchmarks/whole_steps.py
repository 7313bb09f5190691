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
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.suite import dated_table
from benchmarks.suite.flags import whole_number
from benchmarks.suite.pictures import colour
from benchmarks.suite.training_contestants import CONTESTANTS, Setting, serve, why_not
from benchmarks.suite.training_models import NAMES, SIZES
from wrpo.picture_style import WHISKERS, picture
from wrpo.user_error import UserError

BATCH = {"SmolLM2-135M": 4, "Llama": 1, "tiny": 2}  # rows a step
# The loss is a function of margins of order 1 that are sums of hundreds of log-probs of order 10 times BETA = 0.01:
# 0.01 * 500 * 10 * 2^-24 * a few roundings each.
SAME_LOSS = 1e-4
PATIENCE = 900.0  # seconds for one step, or for loading


class Figure(NamedTuple):
    """tokens_s, times_fused: tokens a second, and in the same round those of the fused trainer over them; low and high
    are the ends of the interval. peak_mib: what training added to the process that held model and data. prompt and
    response are tokens of each, 0 with the model's own rows."""

    model: str
    comparison: str
    prompt: int
    response: int
    dtype: str
    contestant: str
    layout: str
    steps: int
    tokens_a_step: float
    tokens_s: float
    tokens_s_low: float
    tokens_s_high: float
    times_fused: float
    times_fused_low: float
    times_fused_high: float
    peak_mib: float
    first_loss: float


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


def compared(setting: Setting) -> list[Figure]:
    """Figures of all contestants that can take part; says why the others cannot."""
    names, title = [], f"{setting.model}, {setting.comparison}"
    for name in CONTESTANTS[setting.comparison]:
        if why := why_not(name):
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
                check_same_work(contestants)
        return list(figures(setting, contestants))
    finally:
        for contestant in contestants:
            contestant.end()


def check_same_work(contestants: list[Contestant]) -> None:
    """Raises UserError unless all had the same tokens and found the same loss in their first step."""
    first = {contestant.name: contestant.taken[0] for contestant in contestants}
    losses, tokens = [step.loss for step in first.values()], {step.tokens for step in first.values()}
    if len(tokens) > 1 or not max(losses) - min(losses) <= SAME_LOSS:
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


# In the picture, in this order.
CALLED = {"full logits": "plain torch", "TRL DPOTrainer": "TRL", "padded": "wrpo, padded rows", "fused": "wrpo"}


def draw(path: Path, facts: dict[str, str], rows: list[Figure]) -> None:
    """Seconds a step on the left, memory on the right; of the pairs, on which TRL takes part."""
    pairs = [row for row in rows if row.comparison == "pairs"]
    pairs.sort(key=lambda row: list(CALLED).index(row.contestant))
    works = dict.fromkeys(work_of(row) for row in pairs)
    note = (
        f"plain torch: our trainer on whole logits. Line: {interval(pairs)}. Times as fast: median over rounds of "
        f"neighbouring steps. {dated_table.caption(facts)}."
    )
    with picture(path, headline(pairs), height=0.27 * (len(pairs) + len(works)) + 1.4, note=note) as plot:
        left, right = plot.subplots(1, 2, sharey=True)
        ticks, y = {}, 0
        for work in works:
            some = [row for row in pairs if work_of(row) == work]
            left.text(0, y, described(some[0]), va="center")
            for row in some:
                y += 1
                draw_row(left, right, y, row)
                ticks[y] = CALLED[row.contestant]
            y += 1
        left.set_yticks(list(ticks), list(ticks.values()))
        left.set_ylim(y - 0.4, -0.5)
        left.set_title("time of a step")
        right.set_title("memory that training adds")
        for axes in (left, right):
            axes.grid(visible=False, axis="y")


def draw_row(left, right, y: int, row: Figure) -> None:
    """A bar and its number on either side, on the left with its interval."""
    seconds, fast, slow = (row.tokens_a_step / rate for rate in (row.tokens_s, row.tokens_s_high, row.tokens_s_low))
    ends = [[seconds - fast], [slow - seconds]]
    left.barh(y, seconds, color=colour(row.contestant), xerr=ends, error_kw=WHISKERS)
    right.barh(y, row.peak_mib / 1024, color=colour(row.contestant))
    for axes, number in ((left, f"{seconds:.1f} s"), (right, f"{row.peak_mib / 1024:.1f} GiB")):
        axes.annotate(number, (0, y), (4, 0), textcoords="offset points", va="center", fontweight="bold")


def headline(pairs: list[Figure]) -> str:
    """The fused trainer beside TRL; where TRL did not run, beside whole logits."""
    ours = {work_of(row): row for row in pairs if row.contestant == "fused"}
    others = [row for row in pairs if row.contestant == "TRL DPOTrainer"]
    others = others or [row for row in pairs if row.contestant == "full logits"]
    faster = span([row.times_fused for row in others], "{:.1f}")
    leaner = span([ours[work_of(row)].peak_mib / row.peak_mib for row in others], "{:.0%}")
    rival = CALLED[others[0].contestant]
    return f"A whole DPO step with wrpo: {faster} times as fast as with {rival}, in {leaner} of the memory"


def span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def interval(rows: list[Figure]) -> str:
    of = f"of {rows[0].steps} steps"
    return f"95 % interval of the median {of}" if rows[0].steps >= 6 else f"smallest to largest {of}"


def work_of(row: Figure) -> tuple:
    return row.model, row.prompt, row.response, row.dtype


def described(row: Figure) -> str:
    """The work of a group of bars."""
    size = SIZES.get(row.model)
    of_size = f"Llama of {size['num_hidden_layers']} layers, vocabulary {size['vocab_size']:,}" if size else row.model
    lengths = f"prompts of {row.prompt} and answers of {row.response} tokens" if row.prompt else "short answers"
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{of_size}, {lengths}, {row.tokens_a_step:.0f} tokens a step{dtype}"


def add_work(parser: argparse.ArgumentParser) -> None:
    length = {"type": whole_number, "action": "append", "default": []}
    parser.add_argument("--comparison", choices=CONTESTANTS, action="append", help="repeatable (default: all)")
    parser.add_argument("--prompt", **length, help="tokens of every prompt; repeatable, each with its --response")
    parser.add_argument("--response", **length, help="tokens of every answer")
    parser.add_argument("--batch", type=whole_number, help="rows a step (default: by the model)")
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help=f"default: {dtype}")


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Raises UserError for prompts and responses that do not go together."""
    if len(args.prompt) != len(args.response):
        raise UserError(f"expected a --response for each --prompt, got {len(args.response)} for {len(args.prompt)}")
    models = ["tiny"] if args.quick else args.model or ["SmolLM2-135M", "Llama"]
    steps = 1 + (3 if args.quick else args.rounds)
    lengths = list(zip(args.prompt, args.response, strict=True)) or [None]
    return [
        Setting(model, comparison, args.batch or BATCH[model], steps, some, args.dtype)
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
            rows += (found := compared(setting))
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
