"""What a run leaves behind for the eye: metrics.json (every log line) and training_curves.png."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback

from wrpo.colours import COLOURS

logger = logging.getLogger("wrpo.training.curves")


class Panel(NamedTuple):
    title: str
    lines: dict[str, str]  # key in the log: name in COLOURS, or else in the panel's own legend
    limits: tuple[float, float] | None = None
    is_noisy: bool = True


PANELS = (
    Panel("loss", {"loss": ""}),
    Panel(
        "implicit reward",
        {
            "rewards/rejected": "rejected",
            "rewards/source_chosen": "source",
            "rewards/target_chosen": "target",
            "rewards/chosen": "weighted chosen",
        },
    ),
    Panel(
        "share of pairs won against rejected",
        {
            "rewards/source_accuracies": "source",
            "rewards/pivot_accuracies": "target",
            "rewards/accuracies": "weighted chosen",
        },
        (-0.03, 1.03),
    ),
    Panel(
        "log-prob of a response (nats)",
        {"logps/rejected": "rejected", "logps/source_chosen": "source", "logps/target_chosen": "target"},
    ),
    Panel("fusion coefficient alpha", {"alpha": ""}, is_noisy=False),
    Panel("learning rate", {"learning_rate": ""}, is_noisy=False),
    Panel("gradient norm", {"grad_norm": ""}),
)
COLUMNS = 4
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
        (folder / "metrics.json").write_text(json.dumps({"log_history": state.log_history}, indent=1))
        if self.draw:
            draw_curves(state.log_history, folder / "training_curves.png")


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> bool:
    """One panel for each group of values that the log holds; training as lines, evaluation as dotted lines with marks.

    Returns whether there was something to draw, and matplotlib to draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s was not drawn: matplotlib is missing (pip install matplotlib)", path.name)
        return False
    panels = [panel for panel in PANELS if any(series(log_history, key)[0] for key in panel.lines)]
    panels += source_panels(log_history)
    if not panels:
        logger.warning(
            "%s was not drawn: training ended before the first line of its log; set logging_steps to no more than the "
            "steps of the run", path.name,
        )  # fmt: skip
        return False
    rows = -(-(len(panels) + 1) // COLUMNS)
    figure = Figure(figsize=(3.9 * COLUMNS, 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, log_history)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    _draw_legend(axes[len(panels)], panels, any("eval_loss" in line for line in log_history))
    figure.savefig(path, dpi=140)
    return True


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


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and those before it within the window."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


_EVALUATION = {"linestyle": ":", "marker": "o", "markersize": 4, "markerfacecolor": "white", "linewidth": 1.2}


def _draw_panel(ax: Any, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    for place, (key, name) in enumerate(panel.lines.items()):
        steps, values = series(log_history, key)
        colour, lone = COLOURS.get(name, f"C{place}"), "o" if len(steps) == 1 else None
        if panel.is_noisy and len(steps) >= SMOOTH_FROM:
            ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
            values = running_mean(values, len(values) // 20)
        ax.plot(steps, values, color=colour, linewidth=1.6, marker=lone, markersize=4, label=name)
        ax.plot(*series(log_history, f"eval_{key}"), color=colour, **_EVALUATION)
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel("optimizer step", fontsize=9)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    if not COLOURS.keys() & set(panel.lines.values()):
        ax.legend(fontsize=7, frameon=False)
    if panel.limits:
        ax.set_ylim(*panel.limits)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))


def _draw_legend(ax: Any, panels: list[Panel], has_evaluation: bool) -> None:
    used = {name for panel in panels for name in panel.lines.values()}
    for name, colour in COLOURS.items():
        if name and name in used:
            ax.plot([], [], color=colour, linewidth=3, label=name)
    if has_evaluation:
        ax.plot([], [], color="#444444", linewidth=1.6, label="training")
        ax.plot([], [], color="#444444", label="evaluation", **_EVALUATION)
    ax.legend(fontsize=10, frameon=False, loc="center left")
