"""python -m benchmarks.gpu [--rounds 10] [--budget-mib 1024] [--out benchmarks/results] [--dry-run] [--draw CSV]

On a CUDA device, every backend with kernels for it, in one run with what bounds it:

    rows      token_logp on bfloat16 and float32 rows: GB/s beside the measured copy; the forward reads, delta reads and
              writes, and each byte is counted once; the same of the statistics and their gradient
    loss      linear_preference_loss, D = 4096, V = 128256, 8192 response tokens in bfloat16: beside the bare matrix
              products of the same rows (three with a trained head, two with a frozen one, one without gradients)

Writes one dated CSV and a picture of it; `--draw` draws that of a CSV again. `--dry-run` runs the same code on toy
sizes on the CPU and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.suite import dated_table
from benchmarks.suite.flags import whole_number
from benchmarks.suite.timing import milliseconds
from wrpo.picture_style import BLACK, BLUE, GREEN, PURPLE, legend_above, picture
from wrpo_kernels import linear_preference_loss
from wrpo_kernels.linear_token_statistics import contract as statistics_contract
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.contract import CANDIDATES

PLAIN = LogitTransform(None, 1.0, 0.0, 1.0)
# Cycles, about 3 ms, that a device is kept busy before a timed call: the host is then ahead of it, as in training,
# where the model's own layers are queued before the head. From an idle device a row kernel seems to take 60 us longer.
HEAD_START = 6_000_000


STATISTICS = {
    "entropy": Wanted(entropy=True, mean_logits=False, log_sum_sq_probs=False, top1=False),
    "statistics": Wanted(*[True] * 4),
}


class Sizes(NamedTuple):
    copy_bytes: int
    row_bytes: int  # of the logits of a row kernel
    vocabularies: tuple[int, ...]
    sequences: int  # of the loss
    length: int
    width: int
    vocabulary: int


FULL = Sizes(1 << 30, 1 << 30, (32000, 128256, 151936), 16, 512, 4096, 128256)
TOY = Sizes(1 << 16, 1 << 16, (257, 1009), 4, 8, 16, 301)


class Figure(NamedTuple):
    scenario: str
    contestant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rate: float
    unit: str  # of the rate
    ratio: float  # time beside the floor of the scenario, median over rounds
    peak_mib: float  # above what stood before


class Stopwatch:
    """Seconds of calls that take turns, by CUDA events; on the CPU, for a dry run, by the clock."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds

    def __call__(
        self, contestants: dict[str, Callable[[], object]], floor: str
    ) -> Iterator[tuple[str, list, float, float]]:
        """Name, times, ratio to the floor and peak memory of each."""
        peaks = {name: self.peak(call) for name, call in contestants.items()}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self.rounds):
            for name, call in contestants.items():
                times[name].append(self.once(call))
        for name in contestants:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[floor], strict=True))
            yield name, times[name], ratio, peaks[name]

    def once(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        first.record()
        call()
        last.record()
        last.synchronize()
        return 1e-3 * first.elapsed_time(last)

    def peak(self, call: Callable[[], object]) -> float:
        call()  # compiles, and fills caches that are not the call's own
        if self.device == "cpu":
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels(logits: Tensor) -> list:
    """The backends that take these logits, but for plain torch: 100 times as slow, it would let the card cool down."""
    return [kernel for kernel in CANDIDATES if kernel.NAME != "reference" and kernel.refuses(logits) is None]


def figures(name: str, floor: str, work: float, unit: str, contestants, watch: Stopwatch) -> Iterator[Figure]:
    """`work`: units of the rate times milliseconds."""
    for contestant, times, ratio, peak in watch(contestants, floor):
        p20, p50, p80 = milliseconds(times)
        yield Figure(name, contestant, p20, p50, p80, work / p50, unit, ratio, peak)


def rows(sizes: Sizes, device: str, watch: Stopwatch) -> Iterator[Figure]:
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    yield from figures("copy", "copy", 2e-6 * sizes.copy_bytes, "GB/s", copy, watch)
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in sizes.vocabularies:
            n = sizes.row_bytes // (vocabulary * dtype.itemsize)
            logits = torch.randn(n, vocabulary, dtype=dtype, device=device)
            labels = torch.randint(0, vocabulary, (n,), device=device)
            for kind, passes in (("forward", 1), *dict.fromkeys(STATISTICS, 1).items(), ("delta_", 2), ("grad_", 2)):
                name = f"{kind} {str(dtype).removeprefix('torch.')} V={vocabulary}"
                contestants = row_contestants(kind, logits, labels)
                half = passes * logits.nbytes // 2  # as many bytes in all: half of them read and half written
                contestants = {"copy": partial(target[:half].copy_, source[:half])} | contestants
                yield from figures(name, "copy", 1e-6 * passes * logits.nbytes, "GB/s", contestants, watch)


def row_contestants(kind: str, logits: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    logp, lse = (torch.empty(*size, len(logits), device=logits.device) for size in ((), (2,)))
    values, coef = (torch.zeros(len(logits), len(COLUMNS), device=logits.device) for _ in range(2))
    wanted = STATISTICS.get(kind, Wanted(*[True] * 4))

    def runs(kernel) -> Callable[[], object]:
        if kind in ("forward", "delta_"):
            return lambda: getattr(kernel, kind)(logits, labels, -100, PLAIN, logp, lse)
        of_rows = statistics_of(kernel)
        if kind == "grad_":
            return lambda: of_rows.grad_(logits, labels, -100, PLAIN, wanted, values, coef)
        top1 = torch.empty_like(labels)
        return lambda: of_rows.statistics(logits, labels, -100, PLAIN, wanted, values, top1)

    return {kernel.NAME: runs(kernel) for kernel in kernels(logits)}


def statistics_of(kernel):
    return next(candidate for candidate in statistics_contract.CANDIDATES if candidate.NAME == kernel.NAME)


class Problem:
    """DPO pairs whose every token counts."""

    def __init__(self, sizes: Sizes, device: str):
        torch.manual_seed(0)
        shape = (sizes.sequences, sizes.length)
        self.hidden = torch.randn(*shape, sizes.width, device=device).bfloat16()
        self.weight = (torch.randn(sizes.vocabulary, sizes.width, device=device) * sizes.width**-0.5).bfloat16()
        self.labels = torch.randint(0, sizes.vocabulary, shape, device=device)
        pairs = sizes.sequences // 2
        self.pairs = {
            "ref_logp": torch.full((sizes.sequences,), -12.0 * sizes.length, device=device),
            "seq_weight": torch.tensor([1.0, -1.0], device=device).repeat(pairs),
            "group": torch.arange(pairs).repeat_interleave(2),  # on the host, as the lengths: nothing waits
            "lengths": [sizes.length] * sizes.sequences,
            "num_groups": pairs,
            "beta": 0.1,
        }

    def fused(self, backend: str, trained: bool, budget: int) -> Callable[[], object]:
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trained)

        def step() -> None:
            hidden.grad = weight.grad = None
            out = linear_preference_loss(
                hidden, weight, self.labels, budget_bytes=budget, backend=backend, **self.pairs
            )
            out.loss.backward()

        return step

    def forward(self, backend: str, budget: int) -> Callable[[], object]:
        @torch.no_grad()
        def step() -> None:
            linear_preference_loss(
                self.hidden, self.weight, self.labels, budget_bytes=budget, backend=backend, **self.pairs
            )

        return step

    def products(self, number: int) -> Callable[[], object]:
        """Logits; dh; dW: the first `number` of them, into buffers that exist."""
        rows, weight = self.hidden.flatten(0, 1), self.weight
        logits = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
        dh, dw = torch.empty_like(rows), torch.empty_like(weight)

        def run() -> None:
            torch.mm(rows, weight.t(), out=logits)
            if number > 1:
                torch.mm(logits, weight, out=dh)
            if number > 2:
                torch.mm(logits.t(), rows, out=dw)

        return run


def losses(sizes: Sizes, device: str, budget: int, watch: Stopwatch) -> Iterator[Figure]:
    problem = Problem(sizes, device)
    names = [kernel.NAME for kernel in kernels(torch.empty(1, 1, dtype=torch.bfloat16, device=device))]
    flops = 2.0 * sizes.sequences * sizes.length * sizes.width * sizes.vocabulary
    ways = {
        "trained head": (3, lambda name: problem.fused(name, True, budget)),
        "frozen head": (2, lambda name: problem.fused(name, False, budget)),
        "forward only": (1, lambda name: problem.forward(name, budget)),
    }
    for way, (number, call) in ways.items():
        contestants = {"products": problem.products(number)} | {name: call(name) for name in names}
        yield from figures(f"loss, {way}", "products", 1e-9 * number * flops, "TFLOP/s", contestants, watch)


KINDS = {
    "loss": "the whole loss, beside its matrix products alone",
    "forward": "log-probs of rows of logits, beside a copy of the same bytes",
    "entropy": "log-probs and entropy of rows, beside a copy of the same bytes",
    "statistics": "all statistics of rows, beside a copy of the same bytes",
    "delta_": "gradient of rows in place, beside a copy of the same bytes",
    "grad_": "gradient of all statistics in place, beside a copy of the same bytes",
}


def draw(path: Path, facts: dict[str, str], figures: list[Figure]) -> None:
    """Times beside the floor of each scenario, by kind: 1 is the copy, or the bare matrix products."""
    ratios = {(f.scenario, f.contestant): f.ratio for f in figures if f.contestant not in ("copy", "products")}
    names = dict(zip(dict.fromkeys(name for _, name in ratios), (GREEN, BLUE, PURPLE), strict=False))
    kinds = {kind: [s for s in dict.fromkeys(s for s, _ in ratios) if s.startswith(kind)] for kind in KINDS}
    kinds = {kind: scenarios for kind, scenarios in kinds.items() if scenarios}  # a CSV may be older than a kind
    whole = [ratio for (scenario, _), ratio in ratios.items() if scenario in kinds["loss"]]
    title = f"{facts['machine']}: the loss takes {min(whole):.2f} to {max(whole):.2f} times its matrix products alone"
    heights = [len(scenarios) + 1.5 for scenarios in kinds.values()]
    with picture(path, title, height=0.24 * sum(heights) + 1.2, note=dated_table.caption(facts)) as plot:
        column = plot.subplots(len(kinds), 1, sharex=True, height_ratios=heights)
        for axes, (kind, scenarios) in zip(column, kinds.items(), strict=True):
            for place, (name, colour) in enumerate(names.items()):
                there = [(ratios[s, name], y) for y, s in enumerate(scenarios) if (s, name) in ratios]
                axes.plot(*zip(*there, strict=True), "o", color=colour, markersize=7, label=name)
                for ratio, y in there:
                    axes.annotate(
                        f"{ratio:.2f}", (1, y), (8 + 28 * place, 0), xycoords=("axes fraction", "data"),
                        textcoords="offset points", color=colour, va="center",
                    )  # fmt: skip
            axes.set_yticks(range(len(scenarios)), [s.removeprefix(kind).strip(" ,") for s in scenarios])
            axes.set_ylim(len(scenarios) - 0.4, -0.6)
            axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
            axes.set_title(KINDS[kind])
        axes.set_xlabel("times as long as the dashed floor")
        legend_above(plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole_number, default=10)
    parser.add_argument("--budget-mib", type=whole_number, default=1024, help="of logits at a time, in the loss")
    dated_table.add_out(parser)
    dated_table.add_draw(parser, Figure)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, nothing written")
    args = parser.parse_args()
    if args.draw:
        return draw(*args.draw)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run runs the same code on toy sizes on the CPU")
    device, sizes = ("cpu", TOY) if args.dry_run else ("cuda", FULL)
    facts, watch = dated_table.facts_of("benchmarks.gpu", device), Stopwatch(device, args.rounds)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    measured = []
    for part in (rows(sizes, device, watch), losses(sizes, device, args.budget_mib << 20, watch)):
        for f in part:
            measured.append(f)
            spread = f"{f.p50_ms:9.3f} ms  [{f.p20_ms:.3f}, {f.p80_ms:.3f}]"
            rate = f"{f.rate:8.1f} {f.unit:<8} {f.ratio:6.3f} x floor  {f.peak_mib:8.1f} MiB"
            print(f"{f.scenario:<28} {f.contestant:<10} {spread}  {rate}", flush=True)
    if not args.dry_run:
        path = dated_table.write(measured, facts, args.out, "gpu")
        draw(path.with_suffix(".png"), facts, measured)
        print(f"wrote {path} and its picture")


if __name__ == "__main__":
    main()
