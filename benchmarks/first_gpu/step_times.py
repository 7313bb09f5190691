"""python -m benchmarks.first_gpu.step_times --out FOLDER: whole steps of the loss, beside the best products known.

Each step from an idle device, where the host's time counts, and with the host ahead, behind 20 ms of other work. The
lengths and groups are on the host, so nothing waits; `ahead` is the share of calls whose kernels were all queued before
the first of them could start. The floor is the faster of torch's (cuBLAS) and quack's products, each into memory that
exists; quack's own cross-entropy step stands beside where it can be imported. steps.csv has every figure.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch

from benchmarks.first_gpu.heads import Head, Run, backends, milliseconds, read_arguments
from benchmarks.first_gpu.steps import headline
from benchmarks.gpu import Problem
from wrpo_kernels.environment import default_budget

KINDS = {"trained": 3, "frozen": 2, "forward": 1}  # products of each
BUSY_MS = 20.0
Calls = dict[str, Callable[[], object]]


class Figure(NamedTuple):
    head: str
    kind: str
    contestant: str
    budget_mib: int
    idle_ms: float
    ahead_ms: float
    ahead: float
    idle_ratio: float  # to the floor, which is measured with the host ahead
    ahead_ratio: float
    tflops: float  # of the products, over ahead_ms


def floors(problem: Problem, number: int, device: str) -> Calls:
    found: Calls = {"torch's products": problem.products(number)}
    if device == "cuda" and (gemm := quack("gemm_interface", "gemm")) is not None:
        found["quack's products"] = quack_products(gemm, problem, number)
    return found


def quack(module: str, name: str) -> Callable | None:
    try:
        return getattr(import_module(f"quack.{module}"), name)
    except Exception as error:  # its compiler may be there in part: whatever it is, say so and go on
        print(f"no quack.{module}.{name}: {type(error).__name__}: {error}")
        return None


def quack_products(gemm: Callable, problem: Problem, number: int) -> Callable[[], object]:
    rows, weight = problem.hidden.flatten(0, 1), problem.weight
    logits = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
    dh, dw = torch.empty_like(rows), torch.empty_like(weight)

    def run() -> None:
        # In the shape that it would choose itself: to try all of them takes longer than the run has.
        gemm(rows, weight.t(), out=logits, tuned=False)
        if number > 1:
            gemm(logits, weight, out=dh, tuned=False)
        if number > 2:
            gemm(logits.t(), rows, out=dw, tuned=False)

    return run


def quack_step(problem: Problem) -> Callable[[], object] | None:
    """Its cross-entropy of the same rows in chunks: no preference loss, but the same three products."""
    function = quack("linear_cross_entropy", "chunked_linear_cross_entropy")
    if function is None:
        return None
    rows = problem.hidden.flatten(0, 1).detach().requires_grad_()
    weight, labels = problem.weight.detach().requires_grad_(), problem.labels.flatten()

    def step() -> None:
        rows.grad = weight.grad = None
        function(rows, weight, labels, tuned=False).backward()

    return step


def steps_of(problem: Problem, kind: str, budget: int, device: str) -> Calls:
    if kind == "forward":
        return {name: problem.forward(name, budget) for name in backends(device)}
    return {name: problem.fused(name, kind == "trained", budget) for name in backends(device)}


def figures(head: Head, kind: str, run: Run, budget: int) -> list[Figure]:
    problem, number = head.problem(run.device), KINDS[kind]
    floor, calls = floors(problem, number, run.device), steps_of(problem, kind, budget, run.device)
    if kind == "trained" and run.device == "cuda" and (other := quack_step(problem)) is not None:
        calls["quack cross-entropy"] = other
    times = {}
    for name, call in {**floor, **calls}.items():
        try:
            idle = milliseconds(call, run.device, run.rounds)
            times[name] = (idle.ms, milliseconds(call, run.device, run.rounds, BUSY_MS))
        except Exception as error:  # of one contestant: the others are still worth their time
            print(f"{head.name}, {kind}: {name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
    best = min((ahead.ms for name, (_, ahead) in times.items() if name in floor), default=float("nan"))
    work = 1e-9 * number * head.flops
    return [
        Figure(
            head.name, kind, name, budget >> 20, idle, ahead.ms, ahead.is_ahead, idle / best, ahead.ms / best,
            work / ahead.ms,
        )
        for name, (idle, ahead) in times.items()
    ]  # fmt: skip


def budgets(run: Run) -> list[int]:
    default = default_budget(torch.device(run.device))
    return [default, 256 << 20, 4 << 30] if run.second else [default]


def main(arguments: list[str] | None = None) -> int:
    run = read_arguments(__doc__, arguments)
    with (run.out / ("steps_second.csv" if run.second else "steps.csv")).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Figure._fields)
        for budget in budgets(run):
            for head in run.heads:
                for kind in KINDS:
                    found = figures(head, kind, run, budget)
                    writer.writerows(found)
                    file.flush()
                    show(found, run)
    return 0


def show(found: list[Figure], run: Run) -> None:
    for f in found:
        headline(
            run.out,
            f"steps: {f.head:<20} {f.kind:<8} {f.contestant:<20} {f.budget_mib:5d} MiB  idle {f.idle_ms:8.3f} ms "
            f"{f.idle_ratio:5.2f} x  ahead {f.ahead_ms:8.3f} ms {f.ahead_ratio:5.2f} x ({f.ahead:.0%})  "
            f"{f.tflops:6.1f} TFLOP/s",
        )


if __name__ == "__main__":
    sys.exit(main())
