"""python -m benchmarks.first_gpu [--out first-gpu] [--second] [--dry-run] [--only smoke]

What a card is asked first, in one command of at most 420 seconds, with all results in one folder:

    build       the CUDA kernels, for this card alone
    smoke       every backend beside float64: odd shapes, poisoned memory, NaN rows, rows beyond the range of the powers
    tests       the tests of the ops that changed since they last ran on a card
    timeline    every kernel of a step and of its bare products, with start and duration: where the time goes
    tune        shapes of the product that leaves powers, the library's products at multiples of 128 rows, the cast
    steps       whole steps from an idle device and with the host ahead, beside the best products known
    sanitize    compute-sanitizer's memcheck over the smoke, where it is installed

`--second` is the run after that, of at most 300 seconds: racecheck, the steps again, more vocabularies and budgets.
Each step has its own process and its own limit, and a failure of one does not stop the rest. Its output is in run.log;
the table at the end is in table.txt too. tuned/<architecture>.json holds the row of `exp_product/devices.json` that
this card would get. `--dry-run` does the same on toy sizes on the CPU, with Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.first_gpu import steps
from benchmarks.first_gpu.verdict import verdict
from benchmarks.suite.results import writable_folder

ROOT = Path(__file__).resolve().parent.parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=writable_folder, default=Path("first-gpu"), metavar="FOLDER", help="for all files"
    )
    parser.add_argument("--second", action="store_true", help="what the second run does")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", choices=steps.NAMES, action="append", help="this step; may be said again")
    parser.add_argument("--seconds", type=int, help="for all steps together; default 420, of the second run 300")
    args = parser.parse_args(arguments)
    seconds = args.seconds or (300 if args.second else 420)
    out = args.out.resolve()
    (out / steps.HEADLINES).unlink(missing_ok=True)
    chosen = [step for step in steps.steps(out, args.second, args.dry_run) if step.name in (args.only or steps.NAMES)]
    end = time.monotonic() + seconds
    with (out / "run.log").open("w") as log:
        outcomes = [steps.run(step, end, log, environment(args.dry_run)) for step in chosen]
    good = {outcome.step: outcome.is_good for outcome in outcomes}
    if not args.dry_run:  # which proves nothing
        steps.headline(out, verdict(out, good.get("smoke", False) and good.get("tests", False)))
    table = steps.table(outcomes, out)
    (out / "table.txt").write_text(table)
    (out / steps.HEADLINES).unlink(missing_ok=True)
    print(table, end="")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def environment(dry_run: bool) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests/kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    played = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry_run else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **played}


if __name__ == "__main__":
    sys.exit(main())
