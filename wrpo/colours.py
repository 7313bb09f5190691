"""What a colour means in every panel of every picture; told apart by the colour-blind too."""

from __future__ import annotations

COLOURS = {
    "weighted chosen": "#111111",
    "source": "#d55e00",
    "target": "#0072b2",
    "rejected": "#8c8c8c",
    "": "#009e73",
}
