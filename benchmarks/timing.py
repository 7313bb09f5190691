"""Timing of several contestants in turns, so that a slow minute of a shared machine hits all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Contestants = dict[str, Callable[[], object]]


def time_in_turns(contestants: Contestants, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call: every round runs every contestant once, in order."""
    for _ in range(warmup):
        for call in contestants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, floor: str) -> float:
    """Median over rounds of the ratio of neighbours in time; steadier than the ratio of two medians."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[floor], strict=True))


def milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    ordered = sorted(seconds)
    return tuple(1e3 * ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


def peak_above_now(call: Callable[[], object]) -> int:
    """Bytes by which the resident size of this process rises at most while `call` runs (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def in_fresh_process(module: str, *arguments: str) -> str:
    """Standard output of `python -m module arguments`: a peak is only a process's own."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
