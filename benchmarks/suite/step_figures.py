"""The figures of `benchmarks.whole_steps`, and their picture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.suite import dated_table
from benchmarks.suite.pictures import colour
from benchmarks.suite.training_models import SIZES
from wrpo.picture_style import WHISKERS, picture


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


# In the picture, in this order.
CALLED = {"full logits": "plain torch", "TRL DPOTrainer": "TRL", "TRL with our head": "TRL with wrpo's head"}
CALLED["padded"] = "wrpo, padded rows"
CALLED |= {name: f"wrpo, {name} rows" for name in ("packed", "packed flex", "packed flash", "shared", "shared flex")}
CALLED |= {"fused": "wrpo"}


def draw(path: Path, facts: dict[str, str], rows: list[Figure]) -> None:
    """Seconds a step on the left, memory on the right; of the pairs, on which TRL takes part, where there are any."""
    pairs = [row for row in rows if row.comparison == "pairs"] or list(rows)
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
            left.text(0, y, described(some[0]), va="center", in_layout=False)  # it may reach into the other half
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
    if not others:
        return "A whole step with wrpo in each layout"
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
    of_rows = f"prompts of {row.prompt}, answers of {row.response} tokens"
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{of_size}, {of_rows if row.prompt else f'{row.tokens_a_step:.0f} tokens a step'}{dtype}"
