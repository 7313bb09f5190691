"""Pictures of a file of results: time and memory along each axis that a scenario sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.suite.contestants import FLOOR, FUSED
from benchmarks.suite.dated_table import caption
from benchmarks.suite.problem import Setting
from benchmarks.suite.results import Row
from benchmarks.suite.scenarios import Scenario
from wrpo.picture_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    as_shares,
    legend_above,
    percent,
    picture,
)

LABELS = {
    "vocabulary": "tokens in the vocabulary",
    "response": "tokens of each response",
    "prompt_share": "share of the tokens that is prompt",
}
PLAIN = "plain torch"
# By the beginning of the name, in the pictures of all benchmarks; whoever is not here is red.
COLOURS = {
    FUSED.name: GREEN, FLOOR: BLACK, PLAIN: GREY, "full logits": GREY, "TRL": ORANGE, "Liger": PURPLE,
    "torch linear CE": SKY, "CCE": BLUE,
}  # fmt: skip


def colour(contestant: str) -> str:
    return next((colour for name, colour in COLOURS.items() if contestant.startswith(name)), RED)


def draw(facts: dict[str, str], rows: list[Row], scenarios: dict[str, Scenario], stem: Path) -> Iterator[Path]:
    """Writes `stem`_<scenario>.png for each sweep that has two points or more."""
    timed = [row for row in rows if row.figure.p50_ms is not None]
    for scenario in scenarios.values():
        some = [row for row in timed if row.figure.scenario == scenario.name]
        if scenario.axis and len({row.figure.point for row in some}) > 1:
            path = stem.with_name(f"{stem.name}_{scenario.name}.png")
            curves(some, scenario, caption(facts), path)
            yield path


def curves(rows: list[Row], scenario: Scenario, machine: str, path: Path) -> None:
    """Time with its p20 to p80 on the left, memory on the right."""
    note = (
        f"{fixed(rows[0].setting, scenario.axis)}. The products are torch's, into ready buffers. "
        f"Lines: medians; bands: 20th to 80th percentile. {machine}."
    )
    with picture(path, message(rows, scenario), height=3.9, note=note) as plot:
        left, right = plot.subplots(1, 2)
        for name in dict.fromkeys(row.figure.contestant for row in rows):
            points = [(along(row.setting, scenario.axis), row.figure) for row in rows if row.figure.contestant == name]
            x, figures = zip(*sorted(points), strict=True)
            style = {"color": colour(name), "marker": "o", "linewidth": 2.4 if name == FUSED.name else 1.3}
            style |= {"linestyle": "--", "zorder": 3} if name == FLOOR else {}
            left.plot(x, [f.p50_ms for f in figures], label=called(name, rows[0].setting), **style)
            low, high = [f.p20_ms for f in figures], [f.p80_ms for f in figures]
            left.fill_between(x, low, high, color=colour(name), alpha=0.15)
            if name != FLOOR:
                right.plot(x, [max(0.0, f.peak_mib) for f in figures], **style)
        left.set_title("time, forward and backward (ms)")
        right.set_title("memory beside inputs and gradients (MiB)")
        for axes in (left, right):
            axes.set_xlabel(LABELS[scenario.axis])
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:,.0f}")
            if scenario.axis == "prompt_share":
                as_shares(axes.xaxis)
        legend_above(plot)


def called(name: str, setting: Setting) -> str:
    """What the legend says."""
    products = ("matrix product", "two matrix products", "three matrix products")[setting.num_products - 1]
    return {FUSED.name: "wrpo", FLOOR: f"the {products} alone"}.get(name, name)


def message(rows: list[Row], scenario: Scenario) -> str:
    """What the last point says of the fused loss beside plain torch, where it has both."""
    last = max(rows, key=lambda row: along(row.setting, scenario.axis)).figure.point
    found = {row.figure.contestant: row.figure for row in rows if row.figure.point == last}
    says = scenario.says[0].upper() + scenario.says[1:]
    if not {FUSED.name, PLAIN} <= found.keys():
        return says
    ours, plain = found[FUSED.name], found[PLAIN]
    memory = percent(max(1.0, ours.peak_mib) / max(1.0, plain.peak_mib))
    return f"{says}: wrpo {plain.times_fused:.1f} times as fast as {PLAIN} at {last}, in {memory} of its memory"


def along(setting: Setting, axis: str) -> float:
    if axis == "prompt_share":
        return setting.prompt / (setting.prompt + setting.response)
    return getattr(setting, axis)


def fixed(setting: Setting, axis: str) -> str:
    """What does not change along the axis."""
    s, tokens = setting, setting.sequences * (setting.response + setting.prompt)
    sizes = {
        "vocabulary": f"width D = {s.width}, N = {s.num_rows} tokens that count",
        "response": f"vocabulary V = {s.vocabulary:,}, width D = {s.width}",
        "prompt_share": f"vocabulary V = {s.vocabulary:,}, width D = {s.width}, {tokens} tokens",
    }
    return f"{sizes[axis]}, {s.dtype}, {s.head} head"
