"""The heads that a first run looks at, and what their calls have in common."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu import Problem, Sizes
from benchmarks.ledger import ROWS
from benchmarks.suite.scenarios import HEADS as SHAPES
from wrpo_kernels.lm_head.head import CANDIDATES

BF16 = torch.bfloat16


class Head(NamedTuple):
    name: str
    vocabulary: int
    width: int
    rows: int
    pairs: int

    @property
    def flops(self) -> float:
        """Of one of its products."""
        return 2.0 * self.rows * self.width * self.vocabulary

    def problem(self, device: str) -> Problem:
        sequences = 2 * self.pairs
        sizes = Sizes(0, 0, (), sequences, self.rows // sequences, self.width, self.vocabulary)
        return Problem(sizes, device)


HEADS = (
    *[Head(name, *shape, ROWS[name], 1) for name, shape in SHAPES.items()],
    Head("Llama-3-8B, 8 pairs", *SHAPES["Llama-3-8B"], 8192, 8),
)
TOYS = (Head("toy", 60, 16, 6, 1), Head("toy, 2 pairs", 60, 16, 4, 2))


class Run(NamedTuple):
    """What every step is told."""

    out: Path
    device: str
    heads: tuple[Head, ...]
    rounds: int
    second: bool
    small: bool

    @property
    def shapes(self) -> list[Head]:
        """Heads of different [V, D]."""
        return [head for head in self.heads if head.pairs == 1]

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"


def read_arguments(words: str | None, arguments: list[str] | None) -> Run:
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--second", action="store_true", help="what the second run does")
    parser.add_argument("--small", action="store_true", help="few and small problems, for compute-sanitizer")
    args = parser.parse_args(arguments)
    if args.dry_run:
        play_on_the_cpu()
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run runs the same on toy sizes on the CPU")
    device, heads, rounds = ("cpu", TOYS, 1) if args.dry_run else ("cuda", HEADS, 7)
    args.out.mkdir(parents=True, exist_ok=True)
    return Run(args.out, device, heads, rounds, args.second, args.small)


def play_on_the_cpu() -> None:
    """Triton's interpreter, as the tests of the kernels have it."""
    import interpreter  # of tests/kernels, which the command puts on the path

    interpreter.compute_like_a_gpu()


def backends(device: str) -> list[str]:
    """Those of the linear ops that run there, but for plain torch."""
    probe = torch.empty(1, 8, dtype=BF16, device=device)
    named = [kernel.NAME for kernel in CANDIDATES if kernel.refuses(probe) is None]
    left_out = ("reference", "triton_fused") if device == "cuda" else ("reference", "triton_fused", "triton")
    return [name for name in named if name not in left_out]


class Time(NamedTuple):
    ms: float  # median
    is_ahead: float  # share of the calls whose last kernel was queued before the device was free to start the first


def milliseconds(call: Callable[[], object], device: str, rounds: int, busy_ms: float = 0.0) -> Time:
    """By CUDA events, behind `busy_ms` of other work, or 0: on an idle device. On the CPU by the clock."""
    call()
    times, ahead = [], []
    for _ in range(rounds):
        if device == "cpu":
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if busy_ms:
            torch.cuda._sleep(int(2e6 * busy_ms))  # cycles, of about 2 GHz
        first.record()
        call()
        last.record()
        ahead.append(not first.query())
        last.synchronize()
        times.append(first.elapsed_time(last))
    return Time(statistics.median(times), sum(ahead) / max(len(ahead), 1))
