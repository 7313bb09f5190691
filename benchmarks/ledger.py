"""What a step of the loss launches on a GPU, phase by phase, counted without one: flops, bytes, a roofline.

python -m benchmarks.ledger                                       a step with a trained head, for the heads of the suite
python -m benchmarks.ledger --kind frozen --prompt 1 --budget-mib 1024 --launches           every launch of every head
python -m benchmarks.ledger --measured benchmarks/results/ledger_H200.csv      beside what a card took: head, phase, ms

The roofline gives a product flops / rate and any other launch bytes / bandwidth, each tensor read and written once; the
time of the host and of the launches themselves is not in it. A phase that a card took more than 10 % apart from is
flagged. `tests/benchmarks/test_ledger.py` holds the counts to their bounds.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.suite.flags import whole_number
from benchmarks.suite.recording import Launch, recorded
from benchmarks.suite.scenarios import HEADS
from wrpo_kernels import linear_nll_loss, linear_preference_loss

# H200, bfloat16 (2026-11-26): its best product of a head, and a copy.
FLOPS_A_SECOND, BYTES_A_SECOND = 780e12, 4.2e12
ROWS = dict(zip(HEADS, (16384, 8192, 4096, 2048), strict=True))  # N of each head
KINDS = {"trained": 3, "frozen": 2, "no_grad": 1}  # products of 2NDV flops
PHASES = ("before the first product", "logits", "rows of logits", "dh", "dW", "other, forward", "other, backward")
APART = 0.1  # of the roofline


class Problem(NamedTuple):
    """`pairs` of responses with `rows` tokens that count in all, behind prompts of `prompt` times their length."""

    vocabulary: int
    width: int
    rows: int
    kind: str = "trained"
    pairs: int = 1
    prompt: int = 0
    budget: int = 4 << 30
    has_margin: bool = True  # else the likelihood alone

    @property
    def flops(self) -> int:
        return KINDS[self.kind] * 2 * self.rows * self.width * self.vocabulary


class Entry(NamedTuple):
    phase: str
    launch: Launch

    @property
    def milliseconds(self) -> float:
        return 1e3 * (self.launch.flops / FLOPS_A_SECOND + self.launch.beside / BYTES_A_SECOND)


def entries(problem: Problem) -> list[Entry]:
    """Every launch of a step, in their order, where the host knows the lengths."""
    sequences, v, d = 2 * problem.pairs, problem.vocabulary, problem.width
    response = problem.rows // sequences
    labels = torch.empty(sequences, response * (1 + problem.prompt), dtype=torch.int64, device="meta")
    hidden, weight = (torch.empty(*size, d, dtype=torch.bfloat16, device="meta") for size in (labels.shape, (v,)))
    given = {
        "ref_logp": torch.empty(sequences, device="meta"),
        "seq_weight": torch.empty(sequences, device="meta"),
        "group": torch.arange(problem.pairs).repeat_interleave(2),
        "num_groups": problem.pairs,
    }
    hidden.requires_grad_(problem.kind != "no_grad")
    weight.requires_grad_(problem.kind == "trained")
    with recorded() as recorder:
        options = {"lengths": [response] * sequences, "budget_bytes": problem.budget}
        if problem.has_margin:
            loss = linear_preference_loss(hidden, weight, labels, beta=0.1, **given, **options).loss
        else:
            loss = linear_nll_loss(hidden, weight, labels, **options).loss
        recorder.mark("backward")
        if loss.requires_grad:
            loss.backward()
    return [entry for side, launches in recorder.phases.items() for entry in _named(launches, side, problem)]


def _named(launches: list[Launch], side: str, problem: Problem) -> Iterator[Entry]:
    is_before = side == "forward"
    for launch in launches:
        is_before = is_before and not launch.flops
        if is_before:
            phase = PHASES[0]
        elif launch.flops:
            is_weight = launch.shape == (problem.vocabulary, problem.width)
            phase = "dW" if is_weight else "dh" if launch.shape[-1] == problem.width else "logits"
        else:
            phase = "rows of logits" if launch.name.startswith("token_logp") else f"other, {side}"
        yield Entry(phase, launch)


def roofline(entries: list[Entry], floor: int, measured: dict[str, float] | None = None) -> Iterator[str]:
    """The lines of a table: of each phase its launches, flops, bytes beside the products, time and share of the floor,
    which is the time of so many flops."""
    floor_ms = 1e3 * floor / FLOPS_A_SECOND
    yield f"  {'phase':<26}{'launches':>9}{'GFLOP':>9}{'MB':>9}{'ms':>8}{'of floor':>9}" + " measured" * bool(measured)
    for phase in (*PHASES, "all"):
        own = [entry for entry in entries if phase in (entry.phase, "all")]
        if not own:
            continue
        flops, beside = (sum(getattr(entry.launch, what) for entry in own) for what in ("flops", "beside"))
        ms = sum(entry.milliseconds for entry in own)
        line = f"  {phase:<26}{len(own):>9}{flops / 1e9:>9.0f}{beside / 1e6:>9.1f}{ms:>8.3f}{ms / floor_ms:>9.3f}"
        yield line + beside_measured(ms, (measured or {}).get(phase))


def beside_measured(ms: float, measured: float | None) -> str:
    if measured is None:
        return ""
    return f"{measured:>9.3f}" + ("  APART" if abs(measured - ms) > APART * ms else "")


def read_measured(path: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by head and phase, of a file with the columns head, phase and ms."""
    found: dict[str, dict[str, float]] = {}
    with path.open() as lines:
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            found.setdefault(row["head"], {})[row["phase"]] = float(row["ms"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="trained")
    parser.add_argument("--pairs", type=whole_number, default=1)
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt, in tokens of its response")
    parser.add_argument("--budget-mib", type=whole_number, default=4096)
    parser.add_argument("--measured", type=read_measured_path, default={}, metavar="CSV")
    parser.add_argument("--launches", action="store_true", help="each one by itself")
    args = parser.parse_args()
    for name, (vocabulary, width) in HEADS.items():
        sizes = (vocabulary, width, ROWS[name], args.kind, args.pairs, args.prompt)
        problem = Problem(*sizes, budget=args.budget_mib << 20)
        step = entries(problem)
        print(f"{name}: V = {vocabulary}, D = {width}, N = {problem.rows}, {args.kind} head, {args.budget_mib} MiB")
        print(*roofline(step, problem.flops, args.measured.get(name)), sep="\n")
        if args.launches:
            print(*(f"    {phase:<26}{one.name:<22}{one.shape}" for phase, one in step), sep="\n")


def read_measured_path(text: str) -> dict[str, dict[str, float]]:
    try:
        return read_measured(Path(text))
    except (OSError, KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a CSV file with head, phase and ms, got {text}: {error}") from None


if __name__ == "__main__":
    main()
