"""The few choices that are not the paper's, made on seed 0 and its validation prompts; no reported seed is seen.

First the learning rate of SFT. Then, for each loss, one rate and beta for its arms with alpha 0 and 0 to 0.5,
by the mean of their accuracies, so that neither is favoured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from .arms import LOSSES, SFT, Arm, preference
from .seed import SeedRun, Size

SFT_RATES = (3e-4, 1e-3, 3e-3)
RATES = (3e-5, 1e-4, 3e-4)
GRID = [
    *[("sigmoid", beta, rate) for beta in (0.1, 1.0) for rate in RATES],
    *[(loss, LOSSES[loss]["beta"], rate) for loss in ("ipo", "simpo") for rate in RATES],
]  # loss, beta, learning rate
ALPHAS = (0.0, 0.5)


def tune(folder: Path, size: Size) -> None:
    """Runs the grid, resumable as everything else, and prints it."""
    seed_run = SeedRun(folder / "seed-0", 0, size, held_out="validation")
    k = size.sources
    _show("target", [accuracy(seed_run, Arm("target", "target", 0))])
    for rate in SFT_RATES:
        arm = Arm(f"sft-{rate:g}", "sft", k, SFT | {"learning_rate": rate})
        _show(f"sft      rate {rate:g}", [accuracy(seed_run, arm)])
    for loss, beta, rate in GRID:
        arms = [candidate(loss, beta, rate, alpha, k) for alpha in ALPHAS]
        _show(f"{loss:<8} beta {beta:g} rate {rate:g}", [accuracy(seed_run, arm) for arm in arms])


def candidate(loss: str, beta: float, rate: float, alpha: float, sources: int) -> Arm:
    arm = preference(f"{loss}-{beta:g}-{rate:g}-{alpha:g}", sources, alpha, loss=loss)
    return arm._replace(settings={**arm.settings, "beta": beta, "learning_rate": rate})


def accuracy(seed_run: SeedRun, arm: Arm) -> float:
    """Per cent of the validation prompts solved, the mean over skills."""
    seed_run.run(arm)
    record = json.loads((seed_run.folder / "results" / f"{arm.name}.json").read_text(encoding="utf-8"))
    return 100 * statistics.fmean(statistics.fmean(solved) for solved in record["solved"].values())


def _show(what: str, found: list[float]) -> None:
    each = "  ".join(f"alpha {alpha}: {value:5.1f}" for alpha, value in zip(ALPHAS, found, strict=False))
    print(f"{what:<30} {statistics.fmean(found):5.1f} % solved   {each if len(found) > 1 else ''}", flush=True)
