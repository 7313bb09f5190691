"""Timing of several contestants in turns, so that a slow minute of a shared machine hits all of them alike."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.suite.problem import Problem

QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


class Phases(NamedTuple):
    """Seconds of one step."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Clock:
    """Marks on the host's clock, or, for a GPU, events in its stream: what the device took, not what Python waited."""

    def __init__(self, device: torch.device):
        self.events = device.type == "cuda"

    def mark(self) -> object:
        if not self.events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, *marks) -> list[float]:
        """Between neighbours."""
        if not self.events:
            return [b - a for a, b in pairwise(marks)]
        marks[-1].synchronize()
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]


def step_of(problem: Problem, loss: Callable[[], Tensor]) -> Callable[[], Phases]:
    """One step: the loss, then its backward, or the loss alone where nothing asks for a gradient."""
    clock = Clock(problem.device)

    def step() -> Phases:
        problem.forget_gradients()
        trains = bool(problem.leaves())
        first = clock.mark()
        with torch.set_grad_enabled(trains):
            value = loss()
        middle = clock.mark()
        if trains:
            value.backward()
        last = clock.mark()
        return Phases(*clock.seconds(first, middle, last))

    return step


def floor_of(problem: Problem) -> Callable[[], Phases]:
    """The bare products; they have no forward and backward, so all their time is given as the forward."""
    clock, products = Clock(problem.device), problem.products()

    def step() -> Phases:
        first = clock.mark()
        products()
        return Phases(*clock.seconds(first, clock.mark()), 0.0)

    return step


def steps_in_turns(steps: dict[str, Callable[[], Phases]], rounds: int) -> dict[str, list[Phases]]:
    """Every round runs every contestant once, in order; the caller has warmed them."""
    taken: dict[str, list[Phases]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(step())
    return taken


def milliseconds(seconds: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, between neighbours where no step is at that place."""
    p20, p50, p80 = (1e3 * torch.tensor(seconds, dtype=torch.float64)).quantile(QUANTILES).tolist()
    return p20, p50, p80


def ratio(phases: list[Phases], others: list[Phases]) -> float:
    """Median over the rounds that both took part in, which are the first ones."""
    return statistics.median(a.both / b.both for a, b in zip(phases, others, strict=False))


def in_fresh_process(module: str, *arguments: str) -> str:
    """Standard output of `python -m module arguments`: a peak is only a process's own."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
