"""What was measured, as tables for the eye and as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import ALL, Comparison
from .intervals import CONFIDENCE, Interval

if TYPE_CHECKING:
    from .implicit_reward import Accuracy  # seconds of imports, which tables of answers do without

Rows = list[list[str]]


def answers_table(comparison: Comparison) -> str:
    """One line a model and group: solved prompts, mean score, wins over the baseline and the gain in score."""
    header = ["model", "group", "prompts", "solved", "mean score"]
    if comparison.wins:
        header += [f"wins over {comparison.baseline}", "better / worse", "score gain"]
    rows: Rows = [header]
    for group in comparison.groups:
        for model in comparison.worth:
            rows.append(_line(comparison, model, group))
    if all(line[3] == "" for line in rows[1:]):
        rows = [line[:3] + line[4:] for line in rows]
    if comparison.groups == [ALL]:
        rows = [line[:1] + line[2:] for line in rows]
    return aligned(rows)


def _line(comparison: Comparison, model: str, group: str) -> list[str]:
    own = comparison.worth[model][group]
    solved = "" if own.solved is None or own.solved_interval is None else with_interval(own.solved, own.solved_interval)
    line = [model, group, str(own.prompts), solved, f"{own.mean_score:.3f}"]
    if comparison.wins and model == comparison.baseline:
        return [*line, "", "", ""]
    if comparison.wins:
        won = comparison.wins[model][group]
        gain = f"{won.score_gain:+.3f}"
        if won.gain_interval is not None:
            gain += f" [{won.gain_interval.low:+.3f}, {won.gain_interval.high:+.3f}]"
        line += [with_interval(won.win_rate, won.win_interval), f"{won.better} / {won.worse}", gain]
    return line


def triples_table(accuracies: dict[str, Accuracy]) -> str:
    """One line for each chosen answer: how often its implicit reward is above the rejected one's, and by how much."""
    rows: Rows = [["r(chosen) > r(rejected)", "triples", "accuracy", "mean margin"]]
    for name, one in accuracies.items():
        rows.append([name, str(one.triples), with_interval(one.accuracy, one.interval), f"{one.margin:+.4g}"])
    return aligned(rows)


def with_interval(share: float, interval: Interval) -> str:
    return f"{share:6.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def aligned(rows: Rows) -> str:
    """Columns as wide as their longest cell, with a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_json(
    path: Path, settings: dict[str, Any], comparison: Comparison | None, accuracies: dict[str, Accuracy] | None
) -> None:
    """Every number of the tables, unrounded, with the settings that made them; intervals as [low, high]."""
    measured: dict[str, Any] = {"confidence": CONFIDENCE, "settings": settings}
    if comparison is not None:
        measured["answers"] = asdict(comparison)
    if accuracies is not None:
        measured["implicit_reward"] = {name: asdict(one) for name, one in accuracies.items()}
    path.write_text(json.dumps(measured, indent=1, ensure_ascii=False), encoding="utf-8")
