"""The few choices that are not the paper's, made on seed 0 and its validation prompts; no reported seed is seen.

First the learning rate of SFT. Then, for each loss, one rate for the arm on target samples (alpha 0) and the WRPO arm
(0 to 0.5), by the mean of their accuracies, so that neither is favoured.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from .arms import LOSSES, SFT, Arm, preference
from .seed import SeedRun, Size

SFT_RATES = (3e-4, 1e-3, 3e-3)
RATES = (1e-4, 3e-4, 1e-3)
ALPHAS = (0.0, 0.5)


def tune(folder: Path, size: Size) -> None:
    """Runs the grid, resumable as everything else, and prints it."""
    seed_run = SeedRun(folder / "seed-0", 0, size, held_out="validation")
    k = size.sources
    _show("target", [accuracy(seed_run, Arm("target", "target", 0))])
    for rate in SFT_RATES:
        arm = Arm(f"sft-{rate:g}", "sft", k, SFT | {"learning_rate": rate})
        _show(f"sft      rate {rate:g}", [accuracy(seed_run, arm)])
    for loss in LOSSES:
        for rate in RATES:
            arms = [preference(f"{loss}-{alpha}-{rate:g}", k, alpha, loss=loss) for alpha in ALPHAS]
            arms = [arm._replace(settings={**arm.settings, "learning_rate": rate}) for arm in arms]
            _show(f"{loss:<8} rate {rate:g}", [accuracy(seed_run, arm) for arm in arms])


def accuracy(seed_run: SeedRun, arm: Arm) -> float:
    """Per cent of the validation prompts solved, the mean over skills."""
    seed_run.run(arm)
    record = json.loads((seed_run.folder / "results" / f"{arm.name}.json").read_text(encoding="utf-8"))
    return 100 * statistics.fmean(statistics.fmean(solved) for solved in record["solved"].values())


def _show(what: str, found: list[float]) -> None:
    each = "  ".join(f"alpha {alpha}: {value:5.1f}" for alpha, value in zip(ALPHAS, found, strict=False))
    print(f"{what:<22} {statistics.fmean(found):5.1f} % solved   {each if len(found) > 1 else ''}", flush=True)
