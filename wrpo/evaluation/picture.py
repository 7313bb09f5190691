"""What was measured as one picture: bars with their intervals, a panel for each table column worth looking at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import Comparison
from .intervals import Interval

if TYPE_CHECKING:
    from .implicit_reward import Accuracy  # seconds of imports, which pictures of answers do without

COLOURS = (
    "#8c8c8c",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # told apart by the colour-blind
Panel = Callable[[Any], None]


def draw(path: Path, comparison: Comparison | None, accuracies: dict[str, Accuracy] | None) -> None:
    """Solved prompts or mean scores, wins over the baseline, implicit-reward accuracies: what was measured of them."""
    from matplotlib.figure import Figure

    panels: list[tuple[int, Panel]] = []  # bars across, and what draws them
    if comparison is not None:
        panels += _answer_panels(comparison)
    if accuracies is not None:
        panels.append((len(accuracies), lambda ax: _draw_accuracies(ax, accuracies)))
    widths = [max(3.4, 0.75 * bars) for bars, _ in panels]
    figure = Figure(figsize=(sum(widths) + 0.6, 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for ax, (_, panel) in zip(axes, panels, strict=True):
        panel(ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=140)


def _answer_panels(comparison: Comparison) -> list[tuple[int, Panel]]:
    groups = comparison.groups
    panels: list[tuple[int, Panel]] = [(len(groups), lambda ax: _draw_worth(ax, comparison))]
    if comparison.wins:
        panels.append((len(groups), lambda ax: _draw_wins(ax, comparison)))
    return panels


def _draw_worth(ax: Any, comparison: Comparison) -> None:
    has_solved = all(one.solved is not None for by_group in comparison.worth.values() for one in by_group.values())
    for place, (model, by_group) in enumerate(comparison.worth.items()):
        values = [one.solved if has_solved else one.mean_score for one in by_group.values()]
        intervals = [one.solved_interval for one in by_group.values()] if has_solved else None
        _bars(ax, place, len(comparison.worth), values, intervals, model, COLOURS[place % len(COLOURS)])
    _name_groups(ax, comparison)
    ax.set_title("prompts solved" if has_solved else "mean score", fontsize=10, loc="left")
    if has_solved:
        _as_share(ax)
    if len(comparison.worth) > 1:
        ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_wins(ax: Any, comparison: Comparison) -> None:
    for place, (model, by_group) in enumerate(comparison.wins.items()):
        rates, intervals = zip(*[(one.win_rate, one.win_interval) for one in by_group.values()], strict=True)
        colour = COLOURS[list(comparison.worth).index(model) % len(COLOURS)]
        _bars(ax, place, len(comparison.wins), list(rates), list(intervals), model, colour)
    ax.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    _name_groups(ax, comparison)
    ax.set_title(f"wins over {comparison.baseline} (ties half)", fontsize=10, loc="left")
    _as_share(ax)


def _draw_accuracies(ax: Any, accuracies: dict[str, Accuracy]) -> None:
    shares = [one.accuracy for one in accuracies.values()]
    _bars(ax, 0, 1, shares, [one.interval for one in accuracies.values()], "", COLOURS[1])
    ax.axhline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(accuracies)), list(accuracies))
    ax.set_title("implicit reward above rejected", fontsize=10, loc="left")
    _as_share(ax)


def _bars(ax: Any, place: int, of: int, values: list[Any], intervals: list[Any] | None, name: str, colour: str) -> None:
    """The bars of one model, beside those of the `of - 1` others, with a whisker for each interval."""
    width = 0.8 / of
    middles = [group + (place - (of - 1) / 2) * width for group in range(len(values))]
    whiskers = None if intervals is None else [_whisker(v, i) for v, i in zip(values, intervals, strict=True)]
    ax.bar(
        middles,
        values,
        0.92 * width,
        label=name,
        color=colour,
        yerr=None if whiskers is None else list(zip(*whiskers, strict=True)),
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#222222"},
    )


def _whisker(value: float, interval: Interval) -> tuple[float, float]:
    return max(0.0, value - interval.low), max(0.0, interval.high - value)


def _name_groups(ax: Any, comparison: Comparison) -> None:
    first = next(iter(comparison.worth.values()))
    ax.set_xticks(range(len(first)), [f"{group}\n{one.prompts}" for group, one in first.items()])
    ax.set_xlabel("group, number of prompts", fontsize=8)


def _as_share(ax: Any) -> None:
    ax.set_ylim(0, 1.18)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
