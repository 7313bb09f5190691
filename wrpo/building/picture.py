"""rewards.png: the rewards of the answers that were chosen and rejected, their gaps, and the share each source won."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from wrpo.colours import COLOURS

from .report import BuildReport

logger = logging.getLogger("wrpo.building")

BINS = 40
TAIL = 0.001  # of the rewards at either end is drawn at the edge, so that one huge reward leaves the rest visible
SHOWN = 15  # source models
NAME_IN_CURVES = {"SFT answer": "", "source_chosen": "source", "target_chosen": "target", "rejected": "rejected"}


def draw_rewards(report: BuildReport, path: Path) -> bool:
    """Returns whether there was something to draw, and matplotlib to draw it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s was not drawn: matplotlib is missing (pip install matplotlib)", path.name)
        return False
    rewards = {answer: np.array(values) for answer, values in report.sample.items() if values}
    if not rewards:
        return False
    figure = Figure(figsize=(14, 0.6 + max(3.8, 0.26 * min(len(report.won), SHOWN))), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_histograms(left, rewards, "rewards", "reward")
    if "rejected" in rewards:
        gaps = {a: rewards[a] - rewards["rejected"] for a in ("source_chosen", "target_chosen")}
        _draw_histograms(middle, gaps, "gap to the rejected answer", "reward - reward(rejected)")
        middle.axvline(0, color="#444444", linewidth=0.8)
    else:
        middle.set_axis_off()
    _draw_shares(right, report)
    figure.savefig(path, dpi=140)
    return True


def _colour(answer: str) -> str:
    return COLOURS[NAME_IN_CURVES[answer]]


def _draw_histograms(ax: Any, values: dict[str, np.ndarray], title: str, label: str) -> None:
    together = np.concatenate(list(values.values()))
    low, high = np.quantile(together, [TAIL, 1 - TAIL])
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    for answer, rewards in values.items():
        heights, _ = np.histogram(rewards.clip(low, high), edges)
        ax.stairs(heights, edges, color=_colour(answer), fill=True, alpha=0.25)
        ax.stairs(heights, edges, color=_colour(answer), linewidth=1.6, label=f"{answer} ({len(rewards):,})")
    _dress(ax, title)
    ax.set_xlabel(label, fontsize=9)
    ax.set_ylabel("rows", fontsize=9)
    ax.legend(fontsize=8, frameon=False)


def _draw_shares(ax: Any, report: BuildReport) -> None:
    shares = report.won.most_common(SHOWN)[::-1]
    total = report.won.total()
    bars = ax.barh(
        [model for model, _ in shares], [count / total for _, count in shares], color=_colour("source_chosen")
    )
    ax.bar_label(bars, [f" {count / total:.1%}" for _, count in shares], fontsize=8)
    ax.margins(x=0.15)
    _dress(ax, f"whose is the best source answer ({total:,} prompts)")
    ax.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _dress(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
