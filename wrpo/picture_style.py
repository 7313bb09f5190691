"""The style of every picture: its message as the title, one width, one scheme of sizes, no boxes, colours for all eyes.

Matplotlib is imported where something is drawn: whoever draws nothing need not have it.
"""

from __future__ import annotations

import importlib
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

logger = logging.getLogger("wrpo")

# Told apart by the colour-blind: M. Okabe and K. Ito, Color Universal Design (2008).
BLACK, GREY, BLUE, RED, GREEN = "#111111", "#8c8c8c", "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
ANSWERS = {"weighted chosen": BLACK, "source": RED, "target": BLUE, "rejected": GREY}
MODELS = (GREY, BLUE, RED, GREEN, PURPLE, ORANGE, SKY)  # by place, the baseline first

WIDTH = 9.0  # inches; pages show pictures about 900 pixels wide, so that 9 points stay readable
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.labelsize": 8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a name with two dollars is a name
}
WHISKERS = {"elinewidth": 1.0, "capsize": 2, "ecolor": "#222222"}


def can_draw(path: Path) -> bool:
    """Whether matplotlib is installed; where it is not, a warning says that the picture is missing."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        logger.warning("%s was not drawn: matplotlib is missing (pip install matplotlib)", path.name)
        return False
    return True


@contextmanager
def picture(path: Path, title: str, *, height: float, note: str = "") -> Iterator[Any]:
    """A (sub)figure to draw on, written to `path` at the end.

    Args:
        title: the message, in lines, above everything.  height: in inches.
        note: small, beneath everything: what was measured, where and when.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.suptitle("\n".join(textwrap.fill(line, 96) for line in title.splitlines()), x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(note, 145), x=0.01, ha="left", color="#555555")
        yield figure.subfigures()
        figure.savefig(path)


def legend_above(figure: Any, handles: Sequence[Any] | None = None) -> None:
    """One legend for all panels, between the title and them: of `handles`, or of the first panel."""
    handles = figure.axes[0].get_legend_handles_labels()[0] if handles is None else handles
    is_wide = sum(len(handle.get_label()) + 7 for handle in handles) > 120  # characters that fit beside each other
    figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // (1 + is_wide)))


def grouped_bars(
    ax: Any,
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    *,
    number: Callable[[float], str] | None = None,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """In each group one bar of each name, side by side, with `number` of its height and a whisker for its interval."""
    width = 0.8 / len(bars)
    for place, ((name, heights), colour) in enumerate(zip(bars.items(), cycle(colours), strict=False)):
        middles = [group + (place - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        whiskers = None
        if intervals is not None:
            ends = zip(heights, intervals[name], strict=True)
            whiskers = list(zip(*[(max(0.0, y - low), max(0.0, high - y)) for y, (low, high) in ends], strict=True))
        drawn = ax.bar(middles, heights, 0.92 * width, label=name, color=colour, yerr=whiskers, error_kw=WHISKERS)
        if number is not None:
            ax.bar_label(drawn, [number(height) for height in heights], fontsize=8, padding=1)
    ax.set_xticks(range(len(groups)), groups)
    room = max(0.0, (6 / len(bars) - len(groups)) / 2)  # so that one bar alone is no slab
    ax.set_xlim(-0.5 - room, len(groups) - 0.5 + room)
    ax.grid(visible=False, axis="x")


def as_shares(axis: Any) -> None:
    """Per cent on an axis whose values are shares of 1."""
    axis.set_major_formatter(lambda share, _: percent(share))


def percent(share: float) -> str:
    return f"{share:.0%}"
