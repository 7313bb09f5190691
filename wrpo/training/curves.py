"""What a run leaves behind for the eye: metrics.json (every log line) and training_curves.png."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from wrpo.picture_style import ANSWERS, BLACK, GREEN, MODELS, as_shares, can_draw, legend_above, percent, picture

logger = logging.getLogger("wrpo.training.curves")


class Panel(NamedTuple):
    title: str
    lines: dict[str, str]  # key in the log: name in ANSWERS, or else in the panel's own legend, or nothing
    is_main: bool = False
    is_noisy: bool = True
    is_share: bool = False


PANELS = (
    Panel("loss", {"loss": ""}, is_main=True),
    Panel(
        "implicit reward",
        {
            "rewards/rejected": "rejected",
            "rewards/source_chosen": "source",
            "rewards/target_chosen": "target",
            "rewards/chosen": "weighted chosen",
        },
        is_main=True,
    ),
    Panel(
        "pairs won against rejected",
        {
            "rewards/source_accuracies": "source",
            "rewards/pivot_accuracies": "target",
            "rewards/accuracies": "weighted chosen",
        },
        is_main=True,
        is_share=True,
    ),
    Panel(
        "log-prob (nats)",
        {"logps/rejected": "rejected", "logps/source_chosen": "source", "logps/target_chosen": "target"},
    ),
    Panel("alpha", {"alpha": ""}, is_noisy=False),
    Panel("gradient norm", {"grad_norm": ""}),
    Panel("learning rate", {"learning_rate": ""}, is_noisy=False),
)
SMOOTH_FROM = 80  # log lines; a longer noisy series is drawn faint, with its running mean over it


class TrainingCurves(TrainerCallback):
    """At the end of training, writes both files into the output folder (main process only)."""

    def __init__(self, draw: bool = True):
        self.draw = draw

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        log = {"log_history": [without_nan(line) for line in state.log_history]}
        (folder / "metrics.json").write_text(json.dumps(log, indent=1, allow_nan=False))
        if self.draw:
            draw_curves(state.log_history, folder / "training_curves.png")


def without_nan(line: dict[str, Any]) -> dict[str, Any]:
    """The line with null for numbers that JSON does not have; lists and mappings in it are none of the trainers'."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> bool:
    """One panel for each group of values that the log holds; training as lines, evaluation as dotted lines with marks.

    Returns whether there was something to draw, and matplotlib to draw it.
    """
    if not can_draw(path):
        return False
    panels = [panel for panel in PANELS if any(series(log_history, key)[0] for key in panel.lines)]
    weights = source_panels(log_history)
    if not panels + weights:
        logger.warning(
            "%s was not drawn: training ended before the first line of its log (logging_strategy)", path.name
        )
        return False
    main, others = [p for p in panels if p.is_main], [p for p in panels if not p.is_main]
    rows = [row for row in (main, others, weights) if row]
    heights = [3.0 if row is main else 2.0 for row in rows]
    with picture(path, headline(log_history), height=0.8 + sum(heights)) as figure:
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            for ax, panel in zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True):
                _draw_panel(ax, panel, log_history)
        _draw_legend(figure, panels, any("eval_loss" in line for line in log_history))
    return True


def headline(log_history: list[dict[str, Any]]) -> str:
    """Where the loss and the pairs won have gone."""
    steps, losses = series(log_history, "loss")
    if not losses:
        return "Training"
    won = series(log_history, "rewards/accuracies")[1]
    ends = f", {percent(smoothed(won)[-1])} of the pairs won at the end" if won else ""
    return f"Loss from {losses[0]:.3g} to {smoothed(losses)[-1]:.3g} in {steps[-1]} steps{ends}"


def source_panels(log_history: list[dict[str, Any]]) -> list[Panel]:
    """A panel of the source models' weights, where they follow performance."""
    prefix = "source_weight/"
    keys = dict.fromkeys(key for line in log_history for key in line if key.startswith(prefix))
    lines = {key: key.removeprefix(prefix) for key in keys}
    return [Panel("weight of each source model", lines, is_noisy=False)] if lines else []


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log lines that hold `key`."""
    pairs = [(line["step"], line[key]) for line in log_history if isinstance(line.get(key), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: list[float]) -> list[float]:
    """The running mean of a long series over a twentieth of it; a short one as it is."""
    return values if len(values) < SMOOTH_FROM else running_mean(values, len(values) // 20)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it within the window."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


_EVALUATION: dict[str, Any] = {"linestyle": ":", "marker": "o", "markerfacecolor": "white", "linewidth": 1.2}


def _draw_panel(ax: Any, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    for place, (key, name) in enumerate(panel.lines.items()):
        steps, values = series(log_history, key)
        colour = ANSWERS.get(name) or (MODELS[place % len(MODELS)] if name else GREEN)
        if panel.is_noisy and len(steps) >= SMOOTH_FROM:
            ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
            values = smoothed(values)
        ax.plot(steps, values, color=colour, marker="o" if len(steps) == 1 else None, label=name)
        ax.plot(*series(log_history, f"eval_{key}"), color=colour, **_EVALUATION)
    ax.set_title(panel.title)
    ax.set_xlabel("optimizer step")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if any(panel.lines.values()) and not ANSWERS.keys() & set(panel.lines.values()):
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if panel.is_share:
        ax.set_ylim(-0.03, 1.03)
        as_shares(ax.yaxis)
    else:
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))


def _draw_legend(figure: Any, panels: list[Panel], has_evaluation: bool) -> None:
    from matplotlib.lines import Line2D

    used = {name for panel in panels for name in panel.lines.values()}
    handles = [Line2D([], [], color=colour, label=name) for name, colour in ANSWERS.items() if name in used]
    if has_evaluation:
        handles.append(Line2D([], [], color=BLACK, label="evaluation", **_EVALUATION))
    if handles:
        legend_above(figure, handles)
