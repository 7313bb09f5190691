"""The claims of a report as one forest plot: differences paired within seeds, each with its interval."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from wrpo.picture_style import BLACK, GREEN, GREY, RED, picture

# A line of the report's table of claims: words, mean, half the interval's width (none of one seed), seeds, verdict.
CLAIM = re.compile(r"^\| ([^|]+) \| (-?[\d.]+)(?: ± ([\d.]+))? \| \d+ \| ([a-z ]+) \|$", re.MULTILINE)
COLOURS = {"repeats": GREEN, "the opposite": RED}


def draw_claims(report: Path) -> Path | None:
    """Writes fusion_claims.png beside the report, from its table; nothing where no claim has been measured yet."""
    claims = CLAIM.findall(report.read_text(encoding="utf-8"))
    if not claims:
        return None
    path = report.with_name("fusion_claims.png")
    found = Counter(verdict for *_, verdict in claims)
    title = f"Of {len(claims)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in found.items())
    note = "Line: 95 % interval of the mean over seeds. A line that crosses 0 is undecided."
    with picture(path, title, height=0.27 * len(claims) + 1.2, note=note) as figure:
        ax = figure.subplots()
        for place, (_, mean, half, verdict) in enumerate(claims):
            colour = COLOURS.get(verdict, GREY)
            ax.errorbar(float(mean), place, xerr=float(half or 0), fmt="o", color=colour, capsize=2)
            number = f"{mean} ± {half}" if half else mean
            ax.annotate(number, (1.01, place), xycoords=("axes fraction", "data"), color=colour, va="center")
        ax.axvline(0, color=BLACK, linewidth=1)
        ax.set_yticks(range(len(claims)), [words.replace("*", "") for words, *_ in claims])
        ax.set_ylim(len(claims) - 0.4, -0.6)
        ax.set_xlabel("difference in held-out prompts solved, percentage points")
    return path
