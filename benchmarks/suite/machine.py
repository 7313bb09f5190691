"""The machine of a run: what it is, how fast its bare products and copies are, and what therefore fits on it."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from benchmarks.suite.memory import available
from benchmarks.suite.problem import Setting
from benchmarks.suite.timing import Clock

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
TIMED = ("wrpo_kernels", "wrpo", "csrc", "benchmarks", ":!benchmarks/results")  # a change of these may change figures
PROBES = {
    "cpu": Setting(16384, 576, response=32),  # a small head: enough to tell 0.5 GFLOP/s from 500
    "cuda": Setting(65536, 4096, response=2048),  # 4 ms at 800 TFLOP/s; the small one would show its launch alone
}


class Speed(NamedTuple):
    """flops a second of the products that give logits, dh and dW."""

    logits: float
    dh: float
    dw: float


@cache
def speed(dtype: str, device: str) -> Speed:
    kind, device = getattr(torch, dtype), torch.device(device)
    probe = PROBES[device.type]
    rows, columns = probe.num_rows, probe.vocabulary
    hidden, weight = torch.randn(rows, probe.width, device=device), torch.randn(columns, probe.width, device=device)
    hidden, weight = hidden.to(kind), weight.to(kind)
    logits = torch.empty(rows, columns, dtype=kind, device=device)
    forms = (
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(logits, weight, out=torch.empty_like(hidden)),
        lambda: torch.mm(logits.t(), hidden, out=torch.empty_like(weight)),
    )
    flops = 2.0 * rows * probe.width * columns
    return Speed(*(flops / best_seconds(form, device) for form in forms))


@cache
def copied_bytes_a_second(device: str) -> float:
    """Read and written, of a copy that no cache holds."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), source.device)


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of the first call, which may have met a busy moment, one more and, where that is over in half a second, three."""
    clock = Clock(device)

    def once() -> float:
        first = clock.mark()
        call()
        return clock.seconds(first, clock.mark())[0]

    best = min(once(), once())
    return best if best > 0.5 else min(best, *(once() for _ in range(3)))


def floor_seconds(setting: Setting, device: str) -> float:
    """What the bare products will take, from their speed on a small head."""
    rates = speed(setting.dtype, device)[: setting.num_products]
    return sum(setting.flops / setting.num_products / rate for rate in rates)


def why_too_large(setting: Setting, device: str) -> str | None:
    """The rule for memory: inputs, two sets of gradients, and operands and gradients of the truth in float64."""
    tokens = setting.sequences * (setting.prompt + setting.response)
    elements = (setting.vocabulary + tokens) * setting.columns
    needed = elements * (3 * setting.itemsize + 16) + (512 << 20)
    if needed > (free := free_bytes(device)):
        return f"operands, gradients and their float64 take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def point_seconds(setting: Setting, device: str, contestants: int) -> float:
    """Five steps of each contestant at 1.25 times the floor: for its peak, its gradients, and the fewest rounds."""
    return 5 * 1.25 * contestants * floor_seconds(setting, device)


def why_too_long(setting: Setting, device: str, contestants: int, allowance: float) -> str | None:
    """The rule for time: a point must fit its allowance."""
    if (seconds := point_seconds(setting, device, contestants)) > allowance:
        most = f"{allowance:.0f} s that one point may take; to time it pass --allow {math.ceil(seconds)}"
        return f"about {seconds:.0f} s for {contestants} contestants, of {most}"
    return None


def free_bytes(device: str) -> int:
    if device == "cpu":
        return available()
    torch.cuda.empty_cache()  # what the last problem left in the allocator
    return torch.cuda.mem_get_info()[0]


def facts(device: str) -> dict[str, str]:
    """What stands at the head of a file of results."""
    machine = torch.cuda.get_device_name() if device == "cuda" else processor()
    lines = {
        "machine": machine,
        "device": device,
        "cores": f"{psutil.cpu_count()}, torch uses {torch.get_num_threads()}",
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        lines["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        lines["cuda"] = str(torch.version.cuda)
    lines |= {name: version for name in PACKAGES if (version := version_of(name))}
    changed = "" if said("git", "status", "--porcelain", "--", *TIMED) == "" else " and changes"
    lines["commit"] = said("git", "rev-parse", "--short=12", "HEAD") + changed
    lines["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    lines["command"] = " ".join(["python -m benchmarks.run", *sys.argv[1:]])
    return lines


def processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
