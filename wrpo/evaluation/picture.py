"""What was measured as one picture: bars with their intervals, a panel for each table column worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrpo.picture_style import BLACK, GREEN, MODELS, as_shares, can_draw, grouped_bars, legend_above, percent, picture

from .comparison import ALL, Comparison

if TYPE_CHECKING:
    from .implicit_reward import Accuracy  # seconds of imports, which pictures of answers do without

SIDE_BY_SIDE = 3  # groups at most; with more, each panel has the whole width


def draw(path: Path, comparison: Comparison | None, accuracies: dict[str, Accuracy] | None) -> bool:
    """Solved prompts or mean scores, wins over the baseline, implicit-reward accuracies: what was measured of them.

    Returns whether there was matplotlib to draw it.
    """
    if not can_draw(path):
        return False
    panels: list[Callable[[Any], None]] = []
    titles, groups = [], 0
    if comparison is not None:
        panels.append(lambda ax: _draw_worth(ax, comparison))
        panels += [lambda ax: _draw_wins(ax, comparison)] if comparison.wins else []
        titles, groups = [_headline(comparison)], len(comparison.groups)
    if accuracies is not None:
        panels.append(lambda ax: _draw_accuracies(ax, accuracies))
        shares = {name: percent(one.accuracy) for name, one in accuracies.items()}
        titles.append(_listed("Implicit reward above rejected", shares))
    rows, columns = (1, len(panels)) if groups <= SIDE_BY_SIDE else (len(panels), 1)
    with picture(path, "\n".join(titles), height=0.9 + 2.4 * rows) as figure:
        for ax, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
            panel(ax)
        if comparison is not None and comparison.wins:
            legend_above(figure)
    return True


def _listed(what: str, numbers: dict[str, str]) -> str:
    return f"{what}: {', '.join(f'{name} {number}' for name, number in numbers.items())}"


def _headline(comparison: Comparison) -> str:
    """What every model is worth on all prompts."""
    of_all = {model: by_group[ALL] for model, by_group in comparison.worth.items()}
    solved = {model: percent(one.solved) for model, one in of_all.items() if one.solved is not None}
    scores = {model: f"{one.mean_score:.3g}" for model, one in of_all.items()}
    return _listed("Prompts solved", solved) if solved else _listed("Mean score", scores)


def _draw_worth(ax: Any, comparison: Comparison) -> None:
    worth = {model: list(by_group.values()) for model, by_group in comparison.worth.items()}
    solved = {model: [(one.solved, one.solved_interval) for one in some] for model, some in worth.items()}
    if all(interval is not None for pairs in solved.values() for _, interval in pairs):
        _draw_shares(ax, "prompts solved", _groups(comparison), solved, MODELS)
    else:
        scores = {model: [one.mean_score for one in some] for model, some in worth.items()}
        grouped_bars(ax, _groups(comparison), scores, MODELS, number=lambda score: f"{score:.3g}")
        ax.margins(y=0.1)
        ax.set_title("mean score")


def _draw_wins(ax: Any, comparison: Comparison) -> None:
    wins = {
        model: [(one.win_rate, one.win_interval) for one in by_group.values()]
        for model, by_group in comparison.wins.items()
    }
    colours = [colour for model, colour in zip(comparison.worth, cycle(MODELS), strict=False) if model in wins]
    _draw_shares(ax, f"wins over {comparison.baseline} (ties half)", _groups(comparison), wins, colours)
    ax.axhline(0.5, color=BLACK, linewidth=0.8, linestyle=":")


def _draw_accuracies(ax: Any, accuracies: dict[str, Accuracy]) -> None:
    shares = {"": [(one.accuracy, one.interval) for one in accuracies.values()]}
    _draw_shares(ax, "implicit reward above rejected", list(accuracies), shares, [GREEN])
    ax.axhline(0.5, color=BLACK, linewidth=0.8, linestyle=":")


def _draw_shares(ax: Any, title: str, groups: list[str], shares: dict[str, list], colours: Sequence[str]) -> None:
    """shares: name -> in each group the share and its interval."""
    heights = {name: [share for share, _ in pairs] for name, pairs in shares.items()}
    intervals = {name: [interval for _, interval in pairs] for name, pairs in shares.items()}
    grouped_bars(ax, groups, heights, colours, number=percent, intervals=intervals)
    ax.set_ylim(0, 1.15)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    as_shares(ax.yaxis)
    ax.set_title(title)


def _groups(comparison: Comparison) -> list[str]:
    first = next(iter(comparison.worth.values()))
    return [f"{group}\n{one.prompts} prompt{'s'[: one.prompts != 1]}" for group, one in first.items()]
