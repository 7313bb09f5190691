"""python -m benchmarks.run [--full] [--scenario NAME] [--only CONTESTANT] [--base COMMIT]

The fused loss beside everything a user would pick instead, on this machine: time, memory and accuracy of each on the
same problems in the same run. Without options the quick set, under 5 minutes on 2 cores; `--full` takes 15 to 40.
The op tests run first: where they are red there are no numbers. Figures are written as they come to
benchmarks/results/, then a table and pictures beside them. benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.suite import machine, pictures, scenarios, tables
from benchmarks.suite.arguments import arguments
from benchmarks.suite.contestants import CONTESTANTS, FLOOR, FUSED
from benchmarks.suite.measure import measured
from benchmarks.suite.problem import Rival, Setting
from benchmarks.suite.results import Figure, ResultFile, Row, file_name, make_room, read
from benchmarks.suite.rivals import missing
from benchmarks.suite.scenarios import Scenario

OP_TESTS = tuple(
    f"tests/kernels/test_linear_preference_{subject}.py" for subject in ("loss", "layout", "graph")
)  # of what is timed
TYPICAL_ROWS = {"cpu": (512, 256), "cuda": (16384, 8192)}  # N of a typical point: full, quick


def main() -> None:
    args = arguments(__doc__)
    device = args.device
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.draw:
        return publish(args.draw, args.readme)
    chosen = chosen_scenarios(args, device)
    facts = machine.facts(device)
    path = args.out / file_name(facts, args.scenario or ([] if args.full else ["quick"]))
    done = finished_rows(path, facts) if args.resume else []
    if not args.skip_tests:
        pass_op_tests(device)
    if args.base is not None:
        from benchmarks.suite.commits import compare

        return compare(args.base, chosen, device, args.allow)
    facts |= speeds(chosen, device)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    if not args.resume:
        make_room(path)
    run(chosen, device, args.only, args.allow, ResultFile(path, facts), done)
    publish(path, args.readme)


def run(
    chosen: dict[str, Scenario], device: str, only: list[str], allowance: float, file: ResultFile, done: Sequence[Row]
) -> None:
    """Measures every point of which `done` has no rows; both come into the file in the order of the scenarios."""
    points = [(scenario, *point) for scenario in chosen.values() for point in scenario.points.items()]
    expected = [machine.point_seconds(s, device, len(takes_part(scenario, only))) for scenario, _, s in points]
    minutes = sum(seconds for seconds in expected if seconds < allowance) / 60
    print(f"{counted(points)}, {spoken(minutes)} and the time to compile", flush=True)
    absent = missing({rival for scenario in chosen.values() for rival in takes_part(scenario, only)}, device)
    if absent:
        names = ", ".join(f"{name} ({package})" for name, package in sorted(absent.items()))
        print(f'not installed: {names}; pip install -e ".[bench]" brings all that run on a CPU', flush=True)
    start, skipped, busy = time.perf_counter(), [], []
    with tqdm(total=len(points), unit="problem", dynamic_ncols=True, disable=None) as progress:
        for scenario, point, setting in points:
            progress.set_description(f"{scenario.name}: {point}")
            rows: Iterable[Row] = [row for row in done if row.figure[:2] == (scenario.name, point)]
            for row in rows or measured(scenario.name, point, setting, takes_part(scenario, only), device, allowance):
                file.add(row)
                skipped += [f"{scenario.name}: {point}"] if row.figure.contestant == "" else []
                busy += [f"{scenario.name}: {point}"] if was_disturbed(row.figure) else []
                if row.figure.contestant not in absent:
                    progress.write(line(row), file=sys.stdout)
            progress.update()
    seconds = time.perf_counter() - start
    print(f"{counted(points)} in", f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes")
    if skipped:
        print("skipped, for the reason above:", "; ".join(skipped))
    if busy:
        print("the machine was busy, p80 is over twice p20; repeat in quiet:", "; ".join(dict.fromkeys(busy)))


def was_disturbed(figure: Figure) -> bool:
    """Whether steps of the same products took very different times. Below a millisecond that says nothing."""
    timed = figure.contestant in (FUSED.name, FLOOR) and figure.p20_ms is not None and figure.p50_ms >= 1
    return timed and figure.p80_ms > 2 * figure.p20_ms


def finished_rows(path: Path, facts: dict[str, str]) -> list[Row]:
    """Those of the points that the same command finished at the same commit on the same day: their floor was timed."""
    if not path.exists():
        return []
    try:
        earlier, rows = read(path)
    except ValueError as error:
        raise SystemExit(f"--resume: {path} is damaged: {error}; without --resume it is moved aside") from None
    differ = [name for name in ("machine", "torch", "commit", "date") if earlier.get(name) != facts[name]]
    differ += ["command"] if asked(earlier.get("command", "")) != asked(facts["command"]) else []
    if differ:
        raise SystemExit(f"--resume: {path} is of another {', '.join(differ)}; without --resume it is moved aside")
    finished = {row.figure[:2] for row in rows if row.figure.contestant in (FLOOR, "")}
    return [row for row in rows if row.figure[:2] in finished]


def asked(command: str) -> list[str]:
    """The words that say what is measured."""
    return [word for word in command.split() if word not in ("--resume", "--skip-tests", "--readme")]


def publish(path: Path, readme: bool) -> None:
    """Tables and pictures from a file of results, and with `readme` the short table of benchmarks/README.md."""
    facts, rows = read(path)
    drawn = list(pictures.draw(facts, rows, scenarios.full(512, "float32"), path.with_suffix("")))
    table = path.with_suffix(".md")
    table.write_text(tables.whole(facts, rows, [picture.name for picture in drawn]))
    print("wrote", path, table, *drawn)
    if readme:
        shown = [picture for picture in drawn if picture.stem.endswith(("_response", "_prompt"))]
        page = machine.ROOT / "benchmarks" / "README.md"
        files = [os.path.relpath(file, page.parent) for file in (table, *shown)]
        tables.put_into_readme(page, facts["device"], tables.summary(facts, rows, *files))
        print(f"wrote the table between the markers of {os.path.relpath(page)}")


def line(row: Row) -> str:
    f = row.figure
    head = f"{f.scenario + ': ' + f.point:<34} {f.contestant:<24}"
    if f.p50_ms is None:
        return f"{head} {f.note}"
    spread = f"{f.p50_ms:10.2f} ms [{f.p20_ms:.2f}, {f.p80_ms:.2f}]"
    beside = f"{f.times_floor:6.2f} x floor"
    fused = "" if f.times_fused is None else f" {f.times_fused:6.2f} x fused"
    memory = "" if f.peak_mib is None else f" {tables.whole_number(f.peak_mib):>8} MiB"
    return f"{head} {spread} {beside}{fused}{memory}"


def counted(points: Sequence) -> str:
    return f"{len(points)} problem{'' if len(points) == 1 else 's'}"


def spoken(minutes: float) -> str:
    if minutes < 0.5:
        return "under a minute"
    return "about a minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"


def takes_part(scenario: Scenario, only: list[str]) -> list[Rival]:
    """The scenario's contestants, or those asked for by name, whatever the scenario has; always the fused loss."""
    names = [FUSED.name, *only] if only else scenario.contestants or CONTESTANTS
    return [CONTESTANTS[name] for name in dict.fromkeys(names)]


def chosen_scenarios(args: argparse.Namespace, device: str) -> dict[str, Scenario]:
    """The quick set, the full one, or those asked for by name (from the full set)."""
    rows = args.rows or TYPICAL_ROWS[device][0 if args.full or args.scenario else 1]
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    every = scenarios.full(rows, dtype) | {"acceptance": scenarios.acceptance()}
    if args.scenario:
        return {name: every[name] for name in args.scenario}
    return scenarios.full(rows, dtype) if args.full else scenarios.quick(rows, dtype)


def pass_op_tests(device: str) -> None:
    """Those of the kernels that run here: Triton's are interpreted on a CPU, and timed nowhere there."""
    which = ("-m", "gpu") if device == "cuda" else ("-m", "not gpu and not slow", "-k", "not triton")
    if importlib.util.find_spec("pytest") is None:
        raise SystemExit('benchmarks.run: the op tests need pytest: pip install -e ".[bench]", or pass --skip-tests')
    print(f"op tests of what is timed: {', '.join(OP_TESTS)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-r", "", *which, *OP_TESTS]
    if subprocess.run(command, cwd=machine.ROOT, check=False).returncode:
        raise SystemExit("the op tests are red: no numbers")


def speeds(chosen: dict[str, Scenario], device: str) -> dict[str, str]:
    """The machine's roofs, for the head of the file."""
    settings: list[Setting] = [setting for scenario in chosen.values() for setting in scenario.points.values()]
    found = {"copy_gbs": f"{machine.copied_bytes_a_second(device) / 1e9:.4g}"}
    for dtype in sorted({setting.dtype for setting in settings}):
        rates = machine.speed(dtype, device)
        found[f"product_gflops_{dtype}"] = f"{max(rates) / 1e9:.4g}"
        found[f"product_gflops_{dtype}_each"] = ", ".join(
            f"{name} {rate / 1e9:.3g}" for name, rate in rates._asdict().items()
        )
    return found


if __name__ == "__main__":
    main()
