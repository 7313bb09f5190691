"""The flags of `python -m benchmarks.run`; what is wrong with them is one line, before anything runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.suite import machine, scenarios
from benchmarks.suite.contestants import CONTESTANTS
from benchmarks.suite.dated_table import add_out
from benchmarks.suite.flags import Flags, number, whole_number
from benchmarks.suite.results import read, writable_folder
from wrpo.user_error import UserError

FEWEST_ROWS = 20  # with fewer, a response of a scenario that is nine tenths prompt is empty
MOST_THREADS = 1024


def arguments(description: str | None) -> argparse.Namespace:
    parser = Flags("python -m benchmarks.run", description)
    have_gpu = torch.cuda.is_available()
    parser.add_argument("--full", action="store_true", help="every scenario, 15 to 40 minutes on 2 cores")
    parser.add_argument("--scenario", action="append", metavar="NAME", choices=scenarios.NAMES,
                        help="only this one of the full set; repeatable: " + ", ".join(scenarios.NAMES))  # fmt: skip
    parser.add_argument("--only", action="append", metavar="CONTESTANT", default=[], choices=list(CONTESTANTS),
                        help="the fused loss beside this one; repeatable: " + ", ".join(CONTESTANTS))  # fmt: skip
    parser.add_argument("--base", metavar="COMMIT", help="the fused loss of this commit beside the one of the checkout")
    parser.add_argument("--device", default="cuda" if have_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=whole_number, help="of torch (default: its own)")
    parser.add_argument("--rows", type=whole_number,
                        help="N of a typical problem (default: 512 or, quick, 256; on a GPU 16384, 8192)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--allow", type=number, metavar="SECONDS", help="one problem may take (default: 90; full or by name 240)"
    )
    add_out(parser)
    parser.add_argument("--skip-tests", action="store_true", help="where they have just passed")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="no measuring: table and pictures of this file")
    parser.add_argument("--resume", action="store_true", help="keep what the same command wrote today at this commit")
    parser.add_argument("--readme", action="store_true", help="also write the short table into benchmarks/README.md")
    try:
        args = parser.read(sys.argv[1:])
        check(args)
    except UserError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    args.allow = args.allow or (240.0 if args.full or args.scenario else 90.0)
    return args


def check(args: argparse.Namespace) -> None:
    """What the type of one flag cannot say.

    Raises:
        UserError: what would otherwise be found after minutes of measuring, or end in a traceback.
    """
    if args.rows is not None and args.rows < FEWEST_ROWS:
        raise UserError(f"argument --rows: expected at least {FEWEST_ROWS}: fewer leave no response, got {args.rows}")
    if args.threads is not None and args.threads > MOST_THREADS:
        raise UserError(f"argument --threads: expected at most {MOST_THREADS}, got {args.threads}")
    if args.allow is not None and args.allow <= 0:
        raise UserError(f"argument --allow: expected seconds > 0, got {args.allow:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"argument --device: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    if args.base is not None and machine.said("git", "rev-parse", "--verify", f"{args.base}^{{commit}}") == "unknown":
        raise UserError(f"argument --base: expected a commit of this repository, got {args.base!r}")
    check_that_all_count(args)
    if args.draw:
        check_results(args.draw)


def check_that_all_count(args: argparse.Namespace) -> None:
    """`--base` prints its comparison and writes nothing, `--draw` measures nothing: what asks for more is refused."""
    measures = ("full", "scenario", "only", "threads", "rows", "dtype", "allow", "resume")
    ways = {
        "--base": (args.base, "only", "readme", "resume", "draw"),
        "--draw": (args.draw, *measures),
    }
    for flag, (given, *others) in ways.items():
        if given is not None and (idle := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]):
            raise UserError(f"argument {flag}: {', '.join(idle)} would do nothing beside it; leave out one of them")


def check_results(path: Path) -> None:
    try:
        read(path)
    except OSError as error:
        raise UserError(f"argument --draw: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"argument --draw: expected a CSV file of benchmarks.run, got {path}: {error}") from None
    try:
        writable_folder(path.parent)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"argument --draw: {error}") from None
