"""rewards.png: the rewards of the answers that were chosen and rejected, their gaps, and the share each source won."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from wrpo.picture_style import ANSWERS, GREEN, as_shares, can_draw, grouped_bars, legend_above, percent, picture

from .report import BuildReport

BINS = 40
FEW = 12  # different values at most are drawn as bars, as those of a verifier that says 0 or 1
NUMBERED = 12  # bars at most have room for their numbers
TAIL = 0.001  # of the rewards at either end is drawn at the edge, so that one huge reward leaves the rest visible
SHOWN = 15  # source models
NAMES = {"SFT answer": "SFT answer", "source_chosen": "source", "target_chosen": "target", "rejected": "rejected"}
COLOURS = {"SFT answer": GREEN} | ANSWERS


def draw_rewards(report: BuildReport, path: Path) -> bool:
    """Returns whether there was something to draw, and matplotlib to draw it."""
    rewards = {NAMES[answer]: np.array(values) for answer, values in report.sample.items() if values}
    if not rewards or not can_draw(path):
        return False
    gaps = {name: rewards[name] - rewards["rejected"] for name in ("source", "target") if "rejected" in rewards}
    bars = min(len(report.won), SHOWN) if len(report.won) > 1 else 0  # of one source there is nothing to compare
    heights = [3.0, 0.7 + 0.2 * bars] if bars else [3.0]
    title = "Mean reward: " + ", ".join(f"{name} {values.mean():.3g}" for name, values in rewards.items())
    with picture(path, title, height=0.8 + sum(heights)) as figure:
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        axes = parts[0].subplots(1, 2 if gaps else 1, squeeze=False)[0]
        _draw_values(axes[0], rewards, "reward")
        if gaps:
            _draw_values(axes[1], gaps, "reward above that of the rejected answer")
        if bars:
            _draw_shares(parts[1].subplots(), report)
        legend_above(parts[0])
    return True


def _draw_values(ax: Any, values: dict[str, np.ndarray], title: str) -> None:
    """How often each value occurs: as bars where they are few, as histograms where they are many."""
    together = np.concatenate(list(values.values()))
    distinct = np.unique(together.round(6))  # 0.6 - 0.2 is 0.4
    colours = [COLOURS[name] for name in values]
    labelled = {f"{name} ({len(some):,})": some for name, some in values.items()}
    if len(distinct) <= FEW:
        bars = {label: [float((some.round(6) == x).mean()) for x in distinct] for label, some in labelled.items()}
        number = percent if len(distinct) * len(bars) <= NUMBERED else None
        grouped_bars(ax, [f"{x:g}" for x in distinct], bars, colours, number=number)
    else:
        low, high = np.quantile(together, [TAIL, 1 - TAIL])
        edges = np.linspace(low, high, BINS + 1)
        for (label, some), colour in zip(labelled.items(), colours, strict=True):
            shares = np.histogram(some.clip(low, high), edges)[0] / len(some)
            ax.stairs(shares, edges, color=colour, fill=True, alpha=0.2)
            ax.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
    ax.set_title(title)
    ax.set_ylabel("share of the rows")
    as_shares(ax.yaxis)


def _draw_shares(ax: Any, report: BuildReport) -> None:
    total = report.won.total()
    shares = {model: count / total for model, count in report.won.most_common(SHOWN)[::-1]}
    bars = ax.barh(list(shares), list(shares.values()), color=ANSWERS["source"])
    ax.bar_label(bars, [f"{share:.1%}" for share in shares.values()], fontsize=8, padding=2)
    ax.grid(visible=False, axis="y")
    ax.set_title(f"whose is the best source answer ({total:,} prompts)")
    as_shares(ax.xaxis)
