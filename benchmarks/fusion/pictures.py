"""What the results look like: accuracy per skill, rewards and alpha over training, alpha and the number of sources."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wrpo.colours import COLOURS
from wrpo.training.curves import series

from .arms import ALPHAS
from .results import EVERYTHING, Results
from .skills import SKILLS

GREY, BLUE, ORANGE, GREEN, PURPLE, BLACK = "#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#111111"


def draw_skills(results: Results, arms: dict[str, str], path: Path) -> None:
    """arms: name -> what to call it."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    ax = figure.subplots()
    groups = [EVERYTHING, *SKILLS]
    width = 0.84 / len(arms)
    colours = (GREY, "#e0b000", GREEN, BLUE, ORANGE, BLACK, PURPLE)
    for place, ((arm, label), colour) in enumerate(zip(arms.items(), colours, strict=False)):
        found = [results.mean(arm, skill) for skill in groups]
        at = [i + (place - (len(arms) - 1) / 2) * width for i in range(len(groups))]
        heights, halves = [e.mean if e else 0 for e in found], [e.half if e else 0 for e in found]
        ax.bar(at, heights, width * 0.92, label=label, color=colour)
        ax.errorbar(at, heights, halves, fmt="none", ecolor="#444444", elinewidth=0.9, capsize=1.5)
    ax.set_xticks(range(len(groups)), [f"{name} skills" if name == EVERYTHING else name for name in groups])
    ax.set_ylim(0, 105)
    ax.set_ylabel("held-out prompts solved (%)")
    figure.legend(
        *ax.get_legend_handles_labels(), frameon=False, ncols=len(arms), fontsize=8, loc="outside upper center"
    )
    _finish(figure, [ax], path)


def draw_training(results: Results, arms: dict[str, str], path: Path) -> None:
    """For each arm the implicit rewards above and the pairs won below, means over seeds; alpha on the right axis."""
    figure = Figure(figsize=(3.6 * len(arms), 5.4), layout="constrained")
    axes = figure.subplots(2, len(arms), squeeze=False, sharex=True, sharey="row")
    rewards = {"rewards/source_chosen": "source", "rewards/target_chosen": "target", "rewards/rejected": "rejected"}
    won = {"rewards/source_accuracies": "source", "rewards/pivot_accuracies": "target"}
    for column, (arm, label) in enumerate(arms.items()):
        logs = [results.records[seed, arm]["log"] for seed in results.seeds(arm)]
        for ax, keys in zip(axes[:, column], (rewards, won), strict=True):
            for key, name in keys.items():
                ax.plot(*mean_series(logs, key), color=COLOURS[name], linewidth=1.4, label=name)
            beside = ax.twinx()
            beside.plot(
                *mean_series(logs, "alpha", bins=200), color=GREEN, linewidth=1.2, linestyle="--", label="alpha"
            )
            beside.set_ylim(-0.03, 1.03)
            beside.tick_params(labelright=column == len(arms) - 1, labelcolor=GREEN, labelsize=8)
            beside.spines[["top"]].set_visible(False)
        axes[0, column].set_title(label, fontsize=9, loc="left")
        axes[1, column].set_xlabel("share of training", fontsize=9)
    axes[0, 0].set_ylabel("implicit reward", fontsize=9)
    axes[1, 0].set_ylabel("share of pairs won\nagainst rejected", fontsize=9)
    axes[1, 0].set_ylim(-0.03, 1.03)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        [*handles, *beside.get_legend_handles_labels()[0]], [*names, "alpha (right)"],
        frameon=False, ncols=4, fontsize=9, loc="outside upper center",
    )  # fmt: skip
    _finish(figure, list(axes.flat), path)


def mean_series(logs: list[list[dict[str, Any]]], key: str, bins: int = 20) -> tuple[list[float], list[float]]:
    """Share of training and mean value there, over the steps of all logs: their numbers of steps differ a little."""
    found: dict[int, list[float]] = {}
    for log in logs:
        steps, values = series(log, key)
        for step, value in zip(steps, values, strict=True):
            found.setdefault(min(bins - 1, int(bins * (step - 1) / max(steps))), []).append(value)
    return [(place + 0.5) / bins for place in sorted(found)], [
        statistics.fmean(found[place]) for place in sorted(found)
    ]


def draw_alpha_and_sources(results: Results, sources: int, path: Path) -> None:
    """Left: accuracy against alpha, rising and static; right: against the number of sources."""
    figure = Figure(figsize=(9.4, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rising = {0.0: f"dpo-{sources}"} | {alpha: f"wrpo-{alpha}-{sources}" for alpha in ALPHAS}
    static = {0.0: f"dpo-{sources}"} | {alpha: f"wrpo-static-{alpha}-{sources}" for alpha in ALPHAS}
    static |= {1.0: f"dpo-source-{sources}"}
    _line(left, results, rising, "alpha rises from 0 to this", BLUE, -0.004)
    _line(left, results, static, "alpha is this throughout", ORANGE, 0.004)
    left.set_xlabel("alpha   (0: DPO on target samples; 1: DPO with source answers chosen)", fontsize=9)
    left.set_ylabel("held-out prompts solved (%), all skills", fontsize=9)
    counts = [count for count in (1, 2, sources) if results.seeds(f"sft-{count}")]
    for shift, (arm, label, colour) in enumerate(
        (("sft", "SFT", GREY), ("dpo", "SFT, DPO", GREEN), ("wrpo-0.5", "SFT, WRPO (0 to 0.5)", BLUE))
    ):
        _line(right, results, {float(c): f"{arm}-{c}" for c in counts}, label, colour, 0.04 * (shift - 1))
    target = results.mean("target")
    if target:
        right.axhline(target.mean, color=BLACK, linewidth=1, linestyle=":", label="target before")
    right.set_xticks(counts)
    right.set_xlim(0.5, sources + 0.5)
    right.set_xlabel("number of sources", fontsize=9)
    for ax in (left, right):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    _finish(figure, [left, right], path)


def _line(ax: Any, results: Results, arms: dict[float, str], label: str, colour: str, shift: float) -> None:
    found = {at: estimate for at, arm in arms.items() if (estimate := results.mean(arm))}
    if found:
        ax.errorbar(
            [at + shift for at in found], [e.mean for e in found.values()], [e.half for e in found.values()],
            color=colour, label=label, marker="o", markersize=4, linewidth=1.4, capsize=2, elinewidth=0.9,
        )  # fmt: skip


def _finish(figure: Figure, axes: list[Any], path: Path) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=140)
