"""Pictures of a file of results: time and memory along each axis that a scenario sweeps, and a roofline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from benchmarks.suite.contestants import FLOOR, FUSED
from benchmarks.suite.dated_table import caption
from benchmarks.suite.problem import RANK, Setting
from benchmarks.suite.results import Row
from benchmarks.suite.scenarios import Scenario

LABELS = {
    "vocabulary": "vocabulary V",
    "response": "tokens of each response",
    "prompt_share": "share of the tokens that is prompt",
    "budget_mib": "budget for logits, MiB",
}
COLOURS = plt.get_cmap("tab10").colors


def draw(facts: dict[str, str], rows: list[Row], scenarios: dict[str, Scenario], stem: Path) -> Iterator[Path]:
    """Writes `stem`_<scenario>.png for each sweep that has two points or more, and `stem`_roofline.png."""
    under = caption(facts)
    timed = [row for row in rows if row.figure.p50_ms is not None]
    for scenario in scenarios.values():
        some = [row for row in timed if row.figure.scenario == scenario.name]
        if scenario.axis and len({row.figure.point for row in some}) > 1:
            yield curves(some, scenario, under, stem.with_name(f"{stem.name}_{scenario.name}.png"))
    if timed and {f"product_gflops_{row.setting.dtype}" for row in timed} <= facts.keys():
        yield roofline(timed, facts, under, stem.with_name(f"{stem.name}_roofline.png"))


def curves(rows: list[Row], scenario: Scenario, under: str, path: Path) -> Path:
    """Time with its p20 to p80 on the left, memory on the right."""
    plot, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, colour in colours(rows).items():
        some = sorted((along(row.setting, scenario.axis), row.figure) for row in rows if row.figure.contestant == name)
        x, figures = [position for position, _ in some], [figure for _, figure in some]
        style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": "--" if name == FLOOR else "-"}
        style["linewidth"] = 2.4 if name == FUSED.name else 1.3
        left.plot(x, [f.p50_ms for f in figures], label=name, **style)
        left.fill_between(x, [f.p20_ms for f in figures], [f.p80_ms for f in figures], color=colour, alpha=0.15)
        if name != FLOOR:
            right.plot(x, [max(1.0, f.peak_mib) for f in figures], label=name, **style)
    left.set_ylabel("forward and backward, ms")
    right.set_ylabel("peak beside inputs and gradients, MiB")
    ticks = sorted({along(row.setting, scenario.axis) for row in rows})
    for axes in (left, right):
        axes.set_xlabel(LABELS[scenario.axis])
        axes.grid(alpha=0.3)
        if scenario.axis != "prompt_share":
            axes.set_xscale("log")
        if scenario.axis in ("prompt_share", "budget_mib"):  # less than a decade, of which a log scale shows no number
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(
            ticks,
            [f"{tick:.2f}" if tick < 1 else f"{tick:g}" for tick in ticks],
            rotation=30 if max(ticks) > 1e4 else 0,
        )
        axes.minorticks_off()
    legend_below(plot, left)
    plot.suptitle(f"{scenario.says}: {fixed(rows[0].setting, scenario.axis)}\n{under}", fontsize=9)
    return saved(plot, path)


def legend_below(plot, axes) -> None:
    """Beneath the axes, where it covers nothing."""
    plot.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


def colours(rows: list[Row]) -> dict[str, object]:
    names = [name for name in dict.fromkeys(row.figure.contestant for row in rows) if name != FLOOR]
    return {FLOOR: "black"} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def along(setting: Setting, axis: str) -> float:
    if axis == "prompt_share":
        return setting.prompt / (setting.prompt + setting.response)
    return getattr(setting, axis)


def fixed(setting: Setting, axis: str) -> str:
    """What does not change along the axis."""
    tokens = setting.sequences * (setting.response + setting.prompt)
    parts = {
        "vocabulary": f"V = {setting.vocabulary}",
        "": f"D = {setting.width}",
        "response": f"N = {setting.num_rows}",
        "prompt_share": f"{tokens} tokens",
    }
    left_out = {"response", "prompt_share"} if axis in ("response", "prompt_share") else {axis, "prompt_share"}
    if axis == "prompt_share":
        left_out = {"response"}
    kept = [text for name, text in parts.items() if name not in left_out]
    return ", ".join([*kept, setting.dtype, f"{setting.head} head"])


def roofline(rows: list[Row], facts: dict[str, str], under: str, path: Path) -> Path:
    """Useful flops a second over useful flops a byte that cannot be avoided, under the machine's measured roofs."""
    plot, axes = plt.subplots(figsize=(8.5, 5.6), layout="constrained")
    for name, colour in colours(rows).items():
        some = [row for row in rows if row.figure.contestant == name]
        x = [row.setting.flops / compulsory_bytes(row.setting) for row in some]
        y = [row.setting.flops / row.figure.p50_ms / 1e6 for row in some]
        mark = {"marker": "_", "s": 140} if name == FLOOR else {"marker": "o", "s": 45 if name == FUSED.name else 18}
        axes.scatter(x, y, label=name, color=colour, zorder=3 if name in (FLOOR, FUSED.name) else 2, **mark)
    bandwidth = float(facts["copy_gbs"])
    roofs = {dtype: fastest_product(facts, rows, dtype) for dtype in sorted({row.setting.dtype for row in rows})}
    low = min(roofs.values()) / bandwidth / 3
    high = 2 * max(row.setting.flops / compulsory_bytes(row.setting) for row in rows)
    for dtype, roof in roofs.items():
        ridge = roof / bandwidth
        axes.plot([low, ridge, high], [bandwidth * low, roof, roof], color="grey", linewidth=1, zorder=1)
        axes.annotate(f"fastest {dtype} product, {roof:.3g} GFLOP/s", (ridge, roof), fontsize=7, va="bottom")
    axes.annotate(f"copy, {bandwidth:.3g} GB/s", (low, bandwidth * low), fontsize=7, va="top")
    top = max(row.setting.flops / row.figure.p50_ms / 1e6 for row in rows)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, 3 * max(top, *roofs.values())))
    axes.set_xlabel("useful flops a byte of operands and gradients")
    axes.set_ylabel("useful GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    legend_below(plot, axes)
    axes.set_title(under, fontsize=9)
    return saved(plot, path)


def fastest_product(facts: dict[str, str], rows: list[Row], dtype: str) -> float:
    """GFLOP/s of the probe before the run, or of a larger head in it, whichever is more."""
    floors = (row for row in rows if row.figure.contestant == FLOOR and row.setting.dtype == dtype)
    of_floors = (row.setting.flops / row.figure.p50_ms / 1e6 for row in floors)
    return max([float(facts[f"product_gflops_{dtype}"]), *of_floors])


def compulsory_bytes(setting: Setting) -> float:
    """Each operand read once, each gradient written once; logits need not exist."""
    rows, head = setting.num_rows * setting.columns, setting.vocabulary * setting.columns
    trained = {"trained": head, "lora": RANK * setting.vocabulary}.get(setting.head, 0)
    gradients = (rows if setting.num_products > 1 else 0) + trained
    return setting.itemsize * (rows + head + gradients)


def saved(plot, path: Path) -> Path:
    plot.savefig(path, dpi=120)
    plt.close(plot)
    return path
