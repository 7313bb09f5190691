"""One problem, all contestants: who can take part, memory, gradients against float64, and only then time, in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator

from benchmarks.suite.accuracy import Errors, Truth
from benchmarks.suite.contestants import FLOOR, FUSED
from benchmarks.suite.machine import why_too_large, why_too_long
from benchmarks.suite.memory import Unaffordable, peak_of
from benchmarks.suite.problem import Problem, Rival, Setting
from benchmarks.suite.results import Figure, Row
from benchmarks.suite.timing import Phases, floor_of, milliseconds, ratio, step_of

FEWEST, MOST = 3, 200  # rounds
FEWEST_CLOSE = 7  # of those that come close to the fastest, where a round or two would decide who that is
CLOSE = 2.0  # times the fastest step
ENOUGH = 6.0  # seconds of rounds in all, where the fewest take less
FIRST_STEP = 60.0  # seconds that a contestant's first step may take beside the point's allowance, to compile


def measured(
    scenario: str, point: str, setting: Setting, contestants: list[Rival], device: str, allowance: float
) -> Iterator[Row]:
    """A row for each contestant and the floor, or one that says why the point was skipped.

    allowance: seconds the point may take. Its size is chosen by the rule of `suite.machine`; its rounds end as
    `rounds_within` says.
    """
    start = time.perf_counter()

    def row(contestant: str, **values) -> Row:
        return Row(Figure(scenario, point, contestant, **values), setting)

    if why := why_too_large(setting, device):
        yield row("", note=f"skipped: {why}")
        return
    problem = Problem(setting, device)
    absent = {rival.name: why for rival in contestants if (why := rival.why_not(problem))}
    able = [rival for rival in contestants if rival.name not in absent]
    if why := why_too_long(setting, device, len(able), allowance):
        yield row("", note=f"skipped: {why}")
        return
    peaks, unaffordable = affordable(problem, able, FIRST_STEP + allowance / 4)
    losses = {rival.name: rival.loss(problem) for rival in contestants if rival.name in peaks}
    errors, wrong = checked(problem, losses)
    for name, why in (absent | unaffordable | wrong).items():
        yield row(name, note=why)
    steps = {name: step_of(problem, losses[name]) for name in errors}
    floor = floor_of(problem)
    floor()
    taken = rounds_within(steps | {FLOOR: floor}, start + allowance)
    for name, phases in taken.items():  # the floor last: its row says that the point is complete
        yield row(name, **times(phases, taken), **worth(peaks.get(name), errors.get(name)))


def affordable(problem: Problem, contestants: list[Rival], patience: float) -> tuple[dict[str, float], dict[str, str]]:
    """Peaks of those whose step this machine has the memory and the patience for, and the reasons of the others."""
    peaks, absent = {}, {}
    for rival in contestants:
        try:
            peaks[rival.name] = peak_of(problem.setting, rival, problem.device.type, problem, patience)
        except Unaffordable as why:
            absent[rival.name] = str(why)
        except Exception as error:
            absent[rival.name] = failure(rival.name, error)
    return peaks, absent


def checked(problem: Problem, losses: dict[str, Callable]) -> tuple[dict[str, Errors], dict[str, str]]:
    """Errors of those whose loss and gradients are the truth, rounded, and what is wrong with the others'."""
    truth = Truth(problem)
    errors, wrong = {}, {}
    for name, loss in losses.items():
        try:
            found = errors_of_one_step(problem, loss, truth)
        except Exception as error:
            wrong[name] = failure(name, error)
            continue
        if why := found.too_large(problem.setting.dtype):
            wrong[name] = f"not timed: {why}"
        else:
            errors[name] = found
    problem.forget_gradients()
    gc.collect()
    return errors, wrong


def errors_of_one_step(problem: Problem, loss: Callable, truth: Truth) -> Errors:
    kept = {}

    def keeps_value():
        kept["loss"] = loss()
        return kept["loss"]

    step_of(problem, keeps_value)()
    return truth.errors(problem, kept["loss"])


def failure(name: str, error: Exception) -> str:
    """A rival that fails is left out with its words; the library's own failure ends the run."""
    if name == FUSED.name:
        raise error
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def rounds_within(steps: dict[str, Callable[[], Phases]], deadline: float) -> dict[str, list[Phases]]:
    """Rounds in which every contestant steps once, in order; each has stepped before.

    After the fewest rounds those that are not close to the fastest have had enough; the others, the fused loss and the
    floor go on.
    """
    taken: dict[str, list[Phases]] = {name: [] for name in steps}
    start, racing = time.perf_counter(), list(steps)
    for done in range(MOST):
        now = time.perf_counter()
        if done >= FEWEST and (now > deadline or (done >= FEWEST_CLOSE and now - start > ENOUGH)):
            break
        if done == FEWEST:
            racing = close_to_the_fastest(taken)
        for name in racing:
            taken[name].append(steps[name]())
    return taken


def close_to_the_fastest(taken: dict[str, list[Phases]]) -> list[str]:
    """Names of the fused loss, the floor, and whoever takes less than `CLOSE` times the fastest contestant."""
    middle = {name: statistics.median(p.both for p in phases) for name, phases in taken.items()}
    fastest = min((seconds for name, seconds in middle.items() if name != FLOOR), default=0.0)
    return [name for name in taken if name in (FLOOR, FUSED.name) or middle[name] < CLOSE * fastest]


def times(phases: list[Phases], taken: dict[str, list[Phases]]) -> dict:
    """The columns of time of one contestant; the floor has no forward and backward of its own."""
    names = ("p20_ms", "p50_ms", "p80_ms")
    found: dict = {"rounds": len(phases)} | dict(zip(names, milliseconds([p.both for p in phases]), strict=True))
    for part in ("forward", "backward") if phases is not taken.get(FLOOR) else ():
        values = milliseconds([getattr(p, part) for p in phases])
        found |= {f"{part}_{name}": value for name, value in zip(names, values, strict=True)}
    for column, other in (("times_floor", FLOOR), ("times_fused", FUSED.name)):
        if other in taken:
            found[column] = ratio(phases, taken[other])
    return found


def worth(peak_mib: float | None, errors: Errors | None) -> dict:
    """The columns beside the time."""
    found = {} if peak_mib is None else {"peak_mib": peak_mib}
    if errors is not None:
        found |= {f"error_{name}": value for name, value in errors._asdict().items()}
    return found
