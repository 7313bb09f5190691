"""python -m benchmarks.run [--full] [--scenario NAME] [--only CONTESTANT] [--base COMMIT]

The fused loss beside everything a user would pick instead, on this machine: time, memory and accuracy of each on the
same problems in the same run. Without options the quick set, under 5 minutes on 2 cores; `--full` takes up to 25.
The op tests run first: where they are red there are no numbers. Figures are written as they come to
benchmarks/results/, then a table and pictures beside them. benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine, pictures, scenarios, tables
from benchmarks.contestants import CONTESTANTS, FLOOR, FUSED
from benchmarks.measure import measured
from benchmarks.problem import Rival, Setting
from benchmarks.results import ResultFile, Row, file_name, read
from benchmarks.scenarios import Scenario
from wrpo.flags import number, whole_number

OP_TESTS = ("linear_preference_loss",)
TYPICAL_ROWS = {"cpu": (512, 256), "cuda": (16384, 8192)}  # N of a typical point: full, quick


def main() -> None:
    args = arguments()
    device = args.device
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.draw:
        return publish(args.draw, args.readme)
    chosen = chosen_scenarios(args, device)
    if not args.skip_tests:
        pass_op_tests(device)
    if args.base:
        from benchmarks.commits import compare

        return compare(args.base, chosen, device, args.allow)
    facts = machine.facts(device) | speeds(chosen, device)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", flush=True)
    path = args.out / file_name(facts, name_of_set(args))
    done = finished_rows(path, facts) if args.resume else []
    run(chosen, device, args.only, args.allow, ResultFile(path, facts), done)
    publish(path, args.readme)


def run(
    chosen: dict[str, Scenario], device: str, only: list[str], allowance: float, file: ResultFile, done: Sequence[Row]
) -> None:
    """Measures every point of which `done` has no rows; both come into the file in the order of the scenarios."""
    points = [(scenario, *point) for scenario in chosen.values() for point in scenario.points.items()]
    expected = [machine.point_seconds(s, device, len(takes_part(scenario, only))) for scenario, _, s in points]
    minutes = round(sum(seconds for seconds in expected if seconds < allowance) / 60)
    span = f"about {minutes} minute{'s' * (minutes > 1)}" if minutes else "under a minute"
    print(f"{len(points)} problem{'s' * (len(points) > 1)}, {span} and the time to compile", flush=True)
    told: set[tuple[str, str]] = set()  # why a contestant takes no part is the same on most problems
    start = time.perf_counter()
    with tqdm(total=len(points), unit="problem", dynamic_ncols=True, disable=None) as progress:
        for scenario, point, setting in points:
            progress.set_description(f"{scenario.name}: {point}")
            rows: Iterable[Row] = [row for row in done if row.figure[:2] == (scenario.name, point)]
            for row in rows or measured(scenario.name, point, setting, takes_part(scenario, only), device, allowance):
                file.add(row)
                if (reason := (row.figure.contestant, row.figure.note)) not in told:
                    progress.write(line(row), file=sys.stdout)
                told |= {reason} if row.figure.note and row.figure.contestant else set()
            progress.update()
    print(f"{len(points)} problems in {(time.perf_counter() - start) / 60:.1f} minutes")


def finished_rows(path: Path, facts: dict[str, str]) -> list[Row]:
    """Those of the points that an earlier run of the same commit on the same day finished: their floor was timed."""
    if not path.exists():
        return []
    earlier, rows = read(path)
    differ = [name for name in ("machine", "torch", "commit", "date") if earlier.get(name) != facts[name]]
    if differ:
        raise SystemExit(f"--resume: {path} is of another {', '.join(differ)}; move it away or leave --resume out")
    finished = {row.figure[:2] for row in rows if row.figure.contestant in (FLOOR, "")}
    return [row for row in rows if row.figure[:2] in finished]


def publish(path: Path, readme: bool) -> None:
    """Tables and pictures from a file of results, and with `readme` the README's block."""
    facts, rows = read(path)
    drawn = list(pictures.draw(facts, rows, scenarios.full(512, "float32"), path.with_suffix("")))
    table = path.with_suffix(".md")
    table.write_text(tables.whole(facts, rows, [picture.name for picture in drawn]))
    print("wrote", path, table, *drawn)
    if readme:
        shown = [picture for picture in drawn if picture.stem.endswith(("_response", "_prompt"))]
        files = [os.path.relpath(file, machine.ROOT) for file in (table, *shown)]
        tables.put_into_readme(machine.ROOT / "README.md", facts["device"], tables.summary(facts, rows, *files))
        print("wrote the table between the markers of README.md")


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
        unknown = sorted(set(args.scenario) - set(every))
        if unknown:
            raise SystemExit(f"no scenario {', '.join(unknown)}; there are {', '.join(every)}")
        return {name: every[name] for name in args.scenario}
    return scenarios.full(rows, dtype) if args.full else scenarios.quick(rows, dtype)


def name_of_set(args: argparse.Namespace) -> str:
    """Each set of scenarios has a file of its own: a short run does not replace the figures of a long one."""
    return "-".join(args.scenario) if args.scenario else "" if args.full else "quick"


def pass_op_tests(device: str) -> None:
    """Those of the kernels that run here: Triton's are interpreted on a CPU, and timed nowhere there."""
    files = [f"tests/test_{op}.py" for op in OP_TESTS]
    which = ("-m", "gpu") if device == "cuda" else ("-m", "not gpu and not slow", "-k", "not triton")
    print(f"op tests of what is timed: {', '.join(OP_TESTS)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-r", "", *which, *files]
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    have_gpu = torch.cuda.is_available()
    parser.add_argument("--full", action="store_true", help="every scenario, up to 25 minutes on 2 cores")
    parser.add_argument("--scenario", action="append", metavar="NAME", help="only this one of the full set; repeatable")
    parser.add_argument("--only", action="append", metavar="CONTESTANT", default=[], choices=list(CONTESTANTS),
                        help="the fused loss beside this one; repeatable: " + ", ".join(CONTESTANTS))  # fmt: skip
    parser.add_argument("--base", metavar="COMMIT", help="the fused loss of this commit beside the one of the checkout")
    parser.add_argument("--device", default="cuda" if have_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=whole_number, help="of torch (default: its own)")
    parser.add_argument(
        "--rows", type=whole_number, help="N of a typical problem (default: 512 on a CPU, 16384 on a GPU)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--allow", type=number, metavar="SECONDS", help="one problem may take (default: 90, full 240)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks/results")
    parser.add_argument("--skip-tests", action="store_true", help="where they have just passed")
    parser.add_argument("--draw", type=Path, metavar="CSV", help="no measuring: table and pictures of this file")
    parser.add_argument("--resume", action="store_true", help="keep what today's file already has of this commit")
    parser.add_argument("--readme", action="store_true", help="also write the short table into README.md")
    args = parser.parse_args()
    if args.device == "cuda" and not have_gpu:
        parser.error("--device cuda: torch sees no CUDA device here")
    if args.allow is not None and args.allow <= 0:
        parser.error(f"--allow: expected seconds above 0, got {args.allow:g}")
    if args.draw and not args.draw.is_file():
        parser.error(f"--draw {args.draw}: no such file; the files of a run are in benchmarks/results")
    if not args.draw and (why := why_unwritable(args.out)):
        parser.error(f"--out {args.out}: {why}")
    args.allow = args.allow or (240.0 if args.full or args.scenario else 90.0)
    return args


def why_unwritable(folder: Path) -> str | None:
    """None of a folder in which files can be made; found out by making one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written to: {error.strerror}"


if __name__ == "__main__":
    main()
