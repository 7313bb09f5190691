"""python -m benchmarks.first_gpu.timeline --out FOLDER: every kernel of a trained step, and of its bare products.

One step of each head under torch's profiler, after two without. timeline.csv has each kernel's start, duration and the
idle time before it, in microseconds; the summary says how long the device was busy, with products and with what else,
and how long it waited for the host. ledger.csv has the phases of the first backend's steps, for `python -m
benchmarks.ledger --measured`, which flags what took longer than its bytes and flops allow.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.first_gpu.heads import Head, Run, backends, read_arguments
from benchmarks.first_gpu.steps import headline
from benchmarks.ledger import PHASES
from wrpo_kernels.environment import default_budget

WARM_UPS = 2
PRODUCTS = ("gemm", "cutlass", "nvjet", "_exp_product_fwd", "aten::mm", "aten::addmm")  # in names of kernels


class Kernel(NamedTuple):
    head: str
    contestant: str
    name: str
    start_us: float  # from the first kernel on
    duration_us: float
    idle_us: float  # since the end of all before it


def recorded(call: Callable[[], object], device: str) -> list[tuple[str, float, float]]:
    """Name, start and duration of what ran on the device; on the CPU of torch's ops."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for _ in range(WARM_UPS):
        call()
    synchronize(device)
    with profile(activities=kinds, acc_events=True) as profiler:
        call()
        synchronize(device)
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    found = [e for e in profiler.events() if e.device_type == wanted and (device == "cuda" or e.cpu_parent is None)]
    spans = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in found]
    return sorted(spans, key=lambda span: span[1])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kernels(head: str, contestant: str, spans: list[tuple[str, float, float]]) -> Iterator[Kernel]:
    first = end = spans[0][1] if spans else 0.0
    for name, start, duration in spans:
        yield Kernel(head, contestant, name, start - first, duration, max(0.0, start - end))
        end = max(end, start + duration)


def is_product(kernel: Kernel) -> bool:
    return any(part in kernel.name for part in PRODUCTS)


def summary(found: list[Kernel]) -> str:
    busy, idle = (sum(getattr(k, what) for k in found) / 1e3 for what in ("duration_us", "idle_us"))
    products = sum(k.duration_us for k in found if is_product(k)) / 1e3
    return f"products {products:8.3f}  other kernels {busy - products:7.3f}  idle {idle:7.3f} ms  {len(found)} kernels"


def phases(found: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each phase of `benchmarks.ledger`, of a step with three products; of any other nothing."""
    if sum(map(is_product, found)) != 3:
        return {}
    times: dict[str, float] = {}
    products = 0
    for kernel in found:
        products += is_product(kernel)
        if is_product(kernel):
            phase = ("logits", "dh", "dW")[products - 1]
        elif products == 0:
            phase = PHASES[0]
        elif "token_logp" in kernel.name:
            phase = "rows of logits"
        else:
            phase = "other, forward" if products == 1 else "other, backward"
        times[phase] = times.get(phase, 0.0) + kernel.duration_us / 1e3
    return times


def contestants(head: Head, run: Run) -> dict[str, Callable[[], object]]:
    problem, budget = head.problem(run.device), default_budget(torch.device(run.device))
    names = [name for name in backends(run.device) if name != "triton"]
    return {
        "products": problem.products(3),
        **{name: problem.fused(name, trained=True, budget=budget) for name in names},
    }


def main(arguments: list[str] | None = None) -> int:
    run = read_arguments(__doc__, arguments)
    with (run.out / "timeline.csv").open("w") as file, (run.out / "ledger.csv").open("w") as ledger:
        writer, of_phases = csv.writer(file, lineterminator="\n"), csv.writer(ledger, lineterminator="\n")
        writer.writerow(Kernel._fields)
        of_phases.writerow(("head", "phase", "ms"))
        for head in run.heads:
            calls = contestants(head, run)
            measured = next((name for name in calls if name not in ("products", "triton_exp")), None)
            for name, call in calls.items():
                found = list(kernels(head.name, name, recorded(call, run.device)))
                writer.writerows(found)
                if name == measured:
                    of_phases.writerows((head.name, phase, ms) for phase, ms in phases(found).items())
                file.flush()
                headline(run.out, f"timeline: {head.name:<20} {name:<10} {summary(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
