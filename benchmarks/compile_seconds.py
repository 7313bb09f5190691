"""python -m benchmarks.compile_seconds [--quick]

The seconds that contestants which compile wait at the first shape of a training run and at the next one, when responses
have another length. Each in a fresh process with an empty cache on disk: the first step of a shape less its second one.
The suite's times leave these seconds out. The fused loss stands beside them; it compiles nothing. Writes a dated CSV.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.suite import dated_table
from benchmarks.suite.contestants import CONTESTANTS, FUSED
from benchmarks.suite.problem import Problem, Setting
from benchmarks.suite.rivals import COMPILED
from benchmarks.suite.timing import floor_of, in_fresh_process, step_of

FIRST = Setting(vocabulary=32768, width=256, examples=2, response=128, prompt=64)  # pairs, which all of them can do
NEXT = FIRST._replace(response=160)


class Figure(NamedTuple):
    contestant: str
    first_shape_s: float
    next_shape_s: float


def waited(name: str, device: str) -> tuple[float, float]:
    """Seconds at the first shape and at the next. Both losses exist before either runs, as in one training run."""
    problems = [Problem(setting, device) for setting in (FIRST, NEXT)]
    floor_of(problems[0])()  # thread pools and libraries start here
    losses = [CONTESTANTS[name].loss(problem) for problem in problems]
    first, following = (beyond_a_step(step_of(*pair)) for pair in zip(problems, losses, strict=True))
    return first, following


def beyond_a_step(step: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return seconds() - seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="torch.compile alone")
    dated_table.add_out(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
            return print(*waited(args.one, device))
    figures = []
    for name in (FUSED.name, *(["torch.compile"] if args.quick else sorted(COMPILED))):
        if why := CONTESTANTS[name].why_not(Problem(FIRST, device)):
            print(f"{name} is skipped: {why}")
            continue
        first, following = in_fresh_process("benchmarks.compile_seconds", "--one", name).split()[-2:]
        figures.append(Figure(name, float(first), float(following)))
        print(f"{name:<20} first shape {float(first):7.2f} s, next shape {float(following):7.2f} s", flush=True)
    facts = dated_table.facts_of("benchmarks.compile_seconds", device)
    print("wrote", dated_table.write(figures, facts, args.out, "compile_seconds"))


if __name__ == "__main__":
    main()
