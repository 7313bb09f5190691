"""The steps of a run, each in its own process with its own limit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TextIO

NAMES = ("build", "smoke", "tests", "timeline", "tune", "steps", "sanitize")
HEADLINES = "headlines.txt"  # one line each, by the steps
LEAST = 5.0  # seconds; with less left a step is not started
TESTS = ("token_statistics_kernels", "exp_product", "unread_values", "linear_preference_large_group", "lengths")
ROOT = Path(__file__).resolve().parent.parent.parent


class Step(NamedTuple):
    name: str
    seconds: float
    command: list[str]
    variables: Mapping[str, str] = MappingProxyType({})
    needs: str = ""  # a program without which it is left out


class Outcome(NamedTuple):
    step: str
    words: str
    seconds: float
    is_good: bool


def steps(out: Path, second: bool, dry_run: bool) -> list[Step]:
    """In the order in which they run; the limits are those of an H200 that has compiled nothing yet."""
    python, dry = sys.executable, ["--dry-run"] * dry_run
    rest = ["--out", str(out), *dry]
    wide = ["--second"] * second

    def part(name: str, *more: str) -> list[str]:
        return [python, "-m", f"benchmarks.first_gpu.{name}", *rest, *more]

    nothing = [python, "-c", "print('left out of a dry run')"]
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    build_for = {"WRPO_BUILD": "cuda", "WRPO_CUDA_ARCHS": architecture(dry_run)}
    files = [f"tests/kernels/test_{name}.py" for name in TESTS]
    # Each shape is compiled once; workers of pytest-xdist do that side by side.
    workers = ["-n", "8", "--dist", "load"] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-k", "not reference", *workers, *files]
    tool = "racecheck" if second else "memcheck"
    sanitize = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *part("smoke", "--small")]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", 60, nothing if dry_run else build, build_for),
        Step("smoke", 45 if second else 60, part("smoke", *wide)),
        Step("tests", 100 if second else 75, nothing if dry_run else tests),
        *([] if second else [Step("timeline", 60, part("timeline"))]),
        *([] if second else [Step("tune", 100, part("tune"))]),
        Step("steps", 90 if second else 70, part("step_times", *wide)),
        Step("sanitize", 45, sanitize, uncached, needs="compute-sanitizer"),
    ]


def architecture(dry_run: bool) -> str:
    """Of the first device, as WRPO_CUDA_ARCHS names it; asked in a process that ends, so that none holds the device."""
    if dry_run:
        return ""
    code = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("torch sees no CUDA device; --dry-run runs the same steps on toy sizes on the CPU")
    return done.stdout.strip()


def run(step: Step, end: float, log: TextIO, environment: dict[str, str]) -> Outcome:
    """Runs it, its lines shown and kept, until its limit or the end of all; kills what it has started."""
    if step.needs and shutil.which(step.needs) is None:
        return Outcome(step.name, f"left out: {step.needs} is not installed", 0.0, True)
    start = time.monotonic()
    limit = min(step.seconds, end - start)
    if limit < LEAST:
        return Outcome(step.name, "not started: the time of the run is up", 0.0, False)
    show(f"== {step.name}: at most {limit:.0f} s", log)
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**environment, **step.variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    reader = threading.Thread(target=copy_lines, args=(process, log), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        words = "done" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        code, words = 1, f"stopped at its limit of {limit:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(LEAST)
    return Outcome(step.name, words, time.monotonic() - start, code == 0)


def copy_lines(process: subprocess.Popen, log: TextIO) -> None:
    for line in process.stdout or ():
        show(line.rstrip("\n"), log)


def show(line: str, log: TextIO) -> None:
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def headline(out: Path, line: str) -> None:
    """A line for the table at the end of the run; shown now too."""
    print(line, flush=True)
    with (out / HEADLINES).open("a") as file:
        file.write(line + "\n")


def table(outcomes: list[Outcome], out: Path) -> str:
    lines = [f"{o.step:<10} {o.seconds:6.1f} s  {o.words}" for o in outcomes]
    found = out / HEADLINES
    lines += ["", *found.read_text().splitlines()] if found.exists() else []
    return "\n".join(["", *lines, "", f"everything is in {out}", ""])
