"""The fused loss of another commit beside the one of the checkout, in one run, in turns.

The other commit is checked out into a folder of its own and its native module is built there. For each problem either
side is a fresh process that imports `wrpo_kernels` from its own tree and these benchmarks from this one; it sits idle
but for its turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.suite import machine
from benchmarks.suite.contestants import FUSED
from benchmarks.suite.measure import rounds_within
from benchmarks.suite.memory import MIB, gradient_bytes, peak_above_now
from benchmarks.suite.problem import Problem, Setting
from benchmarks.suite.scenarios import Scenario
from benchmarks.suite.tables import whole_number
from benchmarks.suite.timing import Phases, milliseconds, ratio, step_of

# The kernels come from the side's own tree, all else from this one.
START = (
    "import sys; sys.path.insert(0, {tree!r}); import wrpo_kernels; sys.path[0] = {here!r}; "
    "from benchmarks.suite.commits import serve; serve({device!r}, {threads})"
)


def compare(commit: str, chosen: dict[str, Scenario], device: str, allowance: float) -> None:
    """Prints, for each problem, times and memory of both and the ratio of times; below 1 the checkout is faster."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the other tree goes away then too
    with tree_of(commit, device) as tree:
        for scenario in chosen.values():
            for point, setting in scenario.points.items():
                why = machine.why_too_large(setting, device) or machine.why_too_long(setting, device, 2, allowance)
                trees = {commit: tree, "checkout": machine.ROOT}
                found = f"skipped: {why}" if why else compared(setting, trees, device, allowance)
                print(f"{scenario.name + ': ' + point:<34}", found, flush=True)


def compared(setting: Setting, trees: dict[str, Path], device: str, allowance: float) -> str:
    """trees: name and folder of the base, then of what is compared with it."""
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(tree, setting, device)) for name, tree in trees.items()}
        deadline = time.perf_counter() + allowance
        taken = rounds_within({name: side.step for name, side in sides.items()}, deadline)
        peaks = {name: side.peak_mib for name, side in sides.items()}
    base, new = trees
    spans = []
    for name, some in taken.items():
        p20, p50, p80 = milliseconds([phases.both for phases in some])
        memory = "" if peaks[name] is None else f", {whole_number(peaks[name])} MiB"
        spans.append(f"{name} {p50:.2f} ms [{p20:.2f}, {p80:.2f}]{memory}")
    return f"{spans[0]}   {spans[1]}   {new} / {base} = {ratio(taken[new], taken[base]):.3f}"


@contextlib.contextmanager
def tree_of(commit: str, device: str) -> Iterator[Path]:
    """A folder with the files of `commit`, its native module built; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="wrpo-base-") as folder:
        tree = Path(folder) / "tree"
        run(["git", "worktree", "add", "--detach", str(tree), commit], machine.ROOT)
        try:
            print(f"building the native module of {commit}", flush=True)
            # Only the kernels of the device: those of CUDA take minutes to compile.
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            run(build, tree, os.environ | {"WRPO_BUILD": device})
            yield tree
        finally:
            run(["git", "worktree", "remove", "--force", str(tree)], machine.ROOT)


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")


class Side:
    """A process that holds one problem and steps when it is told to."""

    def __init__(self, tree: Path, setting: Setting, device: str):
        code = START.format(tree=str(tree), here=str(machine.ROOT), device=device, threads=torch.get_num_threads())
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.peak_mib = self._asked(list(setting))

    def step(self) -> Phases:
        return Phases(*self._asked("step"))

    def _asked(self, message: object):
        print(json.dumps(message), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("one side of the comparison failed; its error stands above")
        return json.loads(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()


def serve(device: str, threads: int) -> None:
    """The other end of a Side: answers the setting with its peak, each further line with the seconds of a step."""
    torch.set_num_threads(threads)
    setting = Setting(*json.loads(sys.stdin.readline()))
    small = Problem(setting._replace(vocabulary=512, response=8, prompt=min(8, setting.prompt)), device)
    step_of(small, FUSED.loss(small))()
    problem = Problem(setting, device)
    step = step_of(problem, FUSED.loss(problem))
    peak = (peak_above_now(step) - gradient_bytes(problem)) / MIB if device == "cpu" else None
    print(json.dumps(peak), flush=True)
    for _line in sys.stdin:
        print(json.dumps(step()), flush=True)
