"""python -m benchmarks.fusion [--seeds N ...] [--arms main|all] [--quick] [--tune] [--out FOLDER] [--docs FILE]
                               [--draw REPORT]

Does fusion work? Trains four specialists of different architectures and tokenizers and a weak generalist, lets them
answer prompts, builds triples, and compares SFT, DPO and WRPO on held-out prompts that verifiers judge.

Every model, answer and result is kept in the folder: a run that was stopped continues with the first arm that it lacks,
and the report is made anew from whatever is there. Two commands with different seeds may share the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; do not ask the hub first

import datasets
import torch
import transformers

from benchmarks.suite.machine import processor
from wrpo.user_error import UserError
from wrpo_kernels import __version__

from .arms import Arm, all_arms
from .models import SOURCES
from .pictures import draw_claims
from .report import read_abouts, write_report
from .results import Results
from .seed import FULL, QUICK, SeedRun, Size, write_whole
from .tuning import tune

SEEDS = (1, 2, 3, 4, 5)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; returns the exit status: 0 done, 2 something the user can put right."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    quieten()
    torch.set_num_threads(options.threads)
    try:
        if options.draw:
            draw(options.draw)
        elif options.tune:
            tune(options.out / "tuning", QUICK if options.quick else FULL)
        else:
            run(options, " ".join(["python -m benchmarks.fusion", *map(shlex.quote, given)]))
    except UserError as error:
        print(f"benchmarks.fusion: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__, formatter_class=formatter)
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}; --quick: 1")
    parser.add_argument("--arms", choices=("all", "main"), default="all", help="main: only those with all sources")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: small, one seed, in a few minutes")
    parser.add_argument("--tune", action="store_true", help="choose learning rates: seed 0, validation prompts")
    parser.add_argument("--report", action="store_true", help="only write the report of what is there")
    parser.add_argument("--draw", type=Path, metavar="REPORT", help="only draw the claims of this report again")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    parser.add_argument("--out", type=Path, help="default: runs/experiment; --quick: runs/experiment-quick")
    parser.add_argument("--docs", type=Path, help="report to write (default: docs/fusion.md; --quick: in the folder)")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("runs/experiment-quick" if options.quick else "runs/experiment")
    options.docs = options.docs or (options.out / "fusion.md" if options.quick else Path("docs/fusion.md"))
    options.seeds = options.seeds or ([1] if options.quick else list(SEEDS))
    return options


def quieten() -> None:
    """One bar or line for each thing that takes time, and nothing else."""
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("wrpo").setLevel(logging.ERROR)


def draw(report: Path) -> None:
    if not report.is_file() or not draw_claims(report):
        raise UserError(f"--draw {report}: expected a report with a table of claims, as --docs writes it")


def run(options: argparse.Namespace, command: str) -> None:
    size = QUICK if options.quick else FULL
    if not options.report:
        for seed in options.seeds:
            run_seed(options, command, seed, size)
    results = Results.read(options.out)
    if not results.records:
        raise UserError(f"no results in {options.out}. Run the experiment without --report first.")
    write_report(results, read_abouts(options.out), size, options.out, options.docs)
    print(f"report  {options.docs}")


def run_seed(options: argparse.Namespace, command: str, seed: int, size: Size) -> None:
    """Every arm that this seed still lacks; the report grows with each."""
    folder = options.out / f"seed-{seed}"
    if not (folder / "about.json").exists():
        write_whole(folder / "about.json", json.dumps(about(command, seed)))
    seed_run = SeedRun(folder, seed, size)
    arms = [arm for arm in all_arms(size.sources) if arm.is_main or options.arms == "all"]
    for arm in [*arms, *(Arm(f"source-{name}", "source", 0) for name in SOURCES if name in seed_run.order)]:
        seed_run.run(arm)
        results = Results.read(options.out)
        accuracy, seconds = results.accuracy(seed, arm.name), results.records[seed, arm.name]["seconds"]
        print(f"seed {seed}  {arm.name:<22} {accuracy:5.1f} % solved   {seconds:5.0f} s", flush=True)
    write_report(results, read_abouts(options.out), size, options.out, options.docs)


def about(command: str, seed: int) -> dict[str, object]:
    """What a published number has to carry."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "wrpo": __version__}
    versions["transformers"] = transformers.__version__
    return {
        "seed": seed,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


if __name__ == "__main__":
    sys.exit(main())
