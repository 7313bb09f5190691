"""Whether what a run saw would make the product that leaves powers the default on this card."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path

import torch

from benchmarks.suite.machine import version_of

NAME = "triton_exp"


def times_of_the_fastest_other(steps: Path) -> dict[str, float]:
    """For each trained head, the time of its step beside that of the fastest other backend, the host ahead."""
    others: dict[str, float] = {}
    mine: dict[str, float] = {}
    with steps.open() as file:
        for row in csv.DictReader(file):
            if row["kind"] == "trained" and row["contestant"] in ("cuda", "triton", "native"):
                others[row["head"]] = min(float(row["ahead_ms"]), others.get(row["head"], float("inf")))
            elif row["kind"] == "trained" and row["contestant"] == NAME:
                mine[row["head"]] = float(row["ahead_ms"])
    return {head: mine[head] / others[head] for head in mine if head in others}


def verdict(out: Path, is_right: bool) -> str:
    """Writes `proved` into the row of this card where smoke and tests were right and no step was slower; says why."""
    rows, steps = sorted((out / "tuned").glob("*.json")), out / "steps.csv"
    if not rows or not steps.exists():
        return f"{NAME}: not proved, tuning or steps did not come to an end"
    ratios = times_of_the_fastest_other(steps)
    shown = ", ".join(f"{head} {ratio:.2f}" for head, ratio in ratios.items())
    if not is_right:
        return f"{NAME}: not proved, smoke or tests failed; steps beside the fastest other: {shown}"
    if not ratios or max(ratios.values()) > 1:
        return f"{NAME}: right, but not the faster everywhere, so it goes on waiting for its name: {shown}"
    table = json.loads(rows[0].read_text())
    for row in table.values():
        row["proved"] = proof()
    rows[0].write_text(json.dumps(table, indent=1) + "\n")
    return f"{NAME}: right and faster ({shown}): the row in tuned/{rows[0].name} may go into exp_product/devices.json"


def proof() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    return {"device": device, "date": today, "torch": torch.__version__, "triton": str(version_of("triton"))}
