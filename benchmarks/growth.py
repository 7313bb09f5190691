"""python -m benchmarks.growth [--rounds 5] [--quick] [--draw CSV]

How time and memory grow, as exponents fitted on logarithms, each with its standard error:

    N            rows that count, of triples          time ~ N,      memory flat: the budget bounds it
    V            vocabulary                           time ~ V,      memory flat
    responses    K + 2, of K = 1 to 16 sources        time ~ K + 2,  memory flat
    candidates   scored answers for `wrpo build`      time ~ count,  memory: a 64th of them at a time, up to its bound

The fused loss runs forward and backward with a trained head in float32. Its budget, 64 MiB of logits, is less than
what the smallest size has and more than what one example ever has, so that all sizes are treated alike. Sizes of an
axis take turns; memory is measured in fresh processes, above inputs, outputs and gradients. Writes a dated CSV,
exponents at its head, and a picture; `--draw` draws that of a CSV again.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from tqdm import tqdm

from benchmarks.build import write_candidates
from benchmarks.suite import dated_table
from benchmarks.suite.contestants import FUSED
from benchmarks.suite.flags import whole_number
from benchmarks.suite.memory import MIB, peak_above_now, peak_of
from benchmarks.suite.problem import Problem, Setting
from benchmarks.suite.timing import milliseconds, step_of, steps_in_turns
from wrpo.picture_style import BLACK, GREEN, picture

BASE = Setting(vocabulary=16384, width=128, examples=16, sources=1, response=32, prompt=32, budget_mib=64)
SETTINGS = {
    "N": {96 * examples: BASE._replace(examples=examples) for examples in (16, 32, 64, 128)},
    "V": {size: BASE._replace(vocabulary=size) for size in (16384, 32768, 65536, 131072)},
    "responses": {sources + 2: BASE._replace(sources=sources) for sources in (1, 2, 4, 8, 16)},
}
QUICK = Setting(vocabulary=2048, width=32, examples=8, sources=1, response=16, prompt=16, budget_mib=1)
QUICK_SETTINGS = {
    "N": {48 * examples: QUICK._replace(examples=examples) for examples in (8, 16, 32)},
    "V": {size: QUICK._replace(vocabulary=size) for size in (2048, 4096, 8192)},
    "responses": {sources + 2: QUICK._replace(sources=sources) for sources in (1, 2, 4)},
}
AXES = {
    "N": "tokens that count, N",
    "V": "vocabulary, V",
    "responses": "responses to a prompt",
    "candidates": "candidates to build from",
}
ANSWERS = 10  # candidates a prompt
PROMPTS = (4000, 12000, 36000)
QUICK_PROMPTS = (500, 1000, 2000)
PATIENCE = 120.0  # seconds for one step


class Figure(NamedTuple):
    """One size: of the three axes of the loss its forward and backward, of candidates the whole build."""

    axis: str
    size: int
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_mib: float


class Exponent(NamedTuple):
    """cost ~ size^value, by least squares on logarithms."""

    value: float
    error: float  # standard, from how far the points are off the line
    at_one: float  # the fitted cost of size 1

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


def exponent(sizes: list[float], costs: list[float]) -> Exponent:
    """Raises ValueError for fewer than three sizes, which say nothing of their own error."""
    if len(sizes) < 3:
        raise ValueError(f"at least three sizes are needed for an exponent and its error, got {len(sizes)}")
    (slope, start), covariance = numpy.polyfit(numpy.log(sizes), numpy.log(costs), 1, cov=True)
    return Exponent(float(slope), float(covariance[0, 0] ** 0.5), float(numpy.exp(start)))


def of_the_loss(axis: str, settings: dict[int, Setting], device: str, rounds: int) -> Iterator[Figure]:
    peaks = {}
    for size, setting in tqdm(settings.items(), desc=f"{axis}: memory", unit="size"):
        peaks[size] = peak_of(setting, FUSED, device, Problem(setting, device), PATIENCE)
    problems = {size: Problem(setting, device) for size, setting in settings.items()}
    steps = {size: step_of(problem, FUSED.loss(problem)) for size, problem in problems.items()}
    steps_in_turns(steps, 1)
    taken = steps_in_turns(steps, rounds)
    for size, phases in taken.items():
        times = milliseconds([phase.both for phase in phases])
        yield Figure(axis, size, rounds, *times, peaks[size])


def of_candidates(prompts: tuple[int, ...], rounds: int) -> Iterator[Figure]:
    # Forked from a server that has imported everything and built nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.suite.contestants", "wrpo.building"])
    peaks, seconds = {}, {number: [] for number in prompts}
    with tempfile.TemporaryDirectory() as folder:
        for number in (50, *prompts):
            write_candidates(number, ANSWERS, f"{folder}/{number}.jsonl")
        for number in tqdm(prompts, desc="candidates: memory", unit="size"):
            with ProcessPoolExecutor(1, mp_context=context) as fresh:
                peaks[number] = fresh.submit(built_peak, folder, number).result() / MIB
        built(folder, 50)
        for _ in range(rounds):
            for number in prompts:
                seconds[number].append(built(folder, number))
    for number in prompts:
        yield Figure("candidates", number * ANSWERS, rounds, *milliseconds(seconds[number]), peaks[number])


def built(folder: str, prompts: int) -> float:
    """Seconds of one build."""
    from wrpo.building import BuildFiles, BuildSettings, build

    files = BuildFiles([f"{folder}/{prompts}.jsonl"], f"{folder}/out", overwrite=True)
    with redirect_stderr(io.StringIO()):  # its own bars
        return build(BuildSettings(), files).seconds


def built_peak(folder: str, prompts: int) -> int:
    """Bytes that a build adds to a process in which a small one has imported and drawn all that it needs."""
    built(folder, 50)
    return peak_above_now(lambda: built(folder, prompts))


def exponents(figures: list[Figure]) -> dict[str, tuple[Exponent, Exponent]]:
    """Of time and of memory along each axis."""
    found = {}
    for axis in dict.fromkeys(figure.axis for figure in figures):
        some = [figure for figure in figures if figure.axis == axis]
        sizes = [figure.size for figure in some]
        found[axis] = (
            exponent(sizes, [figure.p50_ms for figure in some]),
            exponent(sizes, [figure.peak_mib for figure in some]),
        )
    return found


def draw(path: Path, facts: dict[str, str], figures: list[Figure]) -> None:
    """Time above, memory below; dashed: the fitted power."""
    fits = exponents(figures)
    times, memory = ([2 ** both[k].value for both in fits.values()] for k in range(2))
    title = (
        f"Twice the size takes {min(times):.1f} to {max(times):.1f} times the time and "
        f"{min(memory):.1f} to {max(memory):.1f} times the memory"
    )
    note = f"Dashed: the power of the size that fits best. {dated_table.caption(facts)}."
    with picture(path, title, height=5, note=note) as plot:
        grid = plot.subplots(2, len(fits), sharex="col", squeeze=False)
        for column, (axis, both) in zip(grid.T, fits.items(), strict=True):
            some = [figure for figure in figures if figure.axis == axis]
            costs = [figure.p50_ms for figure in some], [figure.peak_mib for figure in some]
            sizes = numpy.array([figure.size for figure in some])
            between = numpy.linspace(min(sizes), max(sizes))
            for axes, fit, measured in zip(column, both, costs, strict=True):
                axes.plot(sizes, measured, "o", color=GREEN)
                axes.plot(between, fit.at_one * between**fit.value, "--", color=BLACK, linewidth=1)
                axes.set_title(f"power {fit.value:.2f} ± {fit.error:.2f}")
                axes.set_xlim(left=0)
                axes.set_ylim(0, 1.25 * max(measured))
                axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=3)
            axes.set_xlabel(AXES[axis])
        grid[0, 0].set_ylabel("time (ms)")
        grid[1, 0].set_ylabel("peak memory (MiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole_number, default=5, help="of each size (default: 5)")
    parser.add_argument("--quick", action="store_true", help="see it run: small sizes, not for publishing")
    dated_table.add_out(parser)
    dated_table.add_draw(parser, Figure)
    args = parser.parse_args()
    if args.draw:
        return draw(*args.draw)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = dated_table.facts_of("benchmarks.growth", device)
    of_builds = list(of_candidates(QUICK_PROMPTS if args.quick else PROMPTS, min(args.rounds, 3)))
    figures: list[Figure] = []
    for axis, settings in (QUICK_SETTINGS if args.quick else SETTINGS).items():
        figures += of_the_loss(axis, settings, device, args.rounds)
    figures += of_builds  # measured first, while the server of fresh processes has not started
    fits = exponents(figures)
    for figure in figures:
        times = f"{figure.p50_ms:10.2f} ms [{figure.p20_ms:.2f}, {figure.p80_ms:.2f}]"
        print(f"{figure.axis:<11} {figure.size:>8} {times} {figure.peak_mib:8.1f} MiB")
    for axis, (of_time, of_memory) in fits.items():
        print(f"{axis:<11} time ~ {axis}^({of_time}), memory ~ {axis}^({of_memory})")
        facts |= {f"exponent of time in {axis}": str(of_time), f"exponent of memory in {axis}": str(of_memory)}
    path = dated_table.write(figures, facts, args.out, "growth_quick" if args.quick else "growth")
    draw(path.with_suffix(".png"), facts, figures)
    print(f"wrote {path} and its picture")


if __name__ == "__main__":
    main()
