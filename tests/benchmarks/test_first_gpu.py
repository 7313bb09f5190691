"""The first run with a card: no step takes another's time, a dry run does all of it, only proof flips a default."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import ledger
from benchmarks.first_gpu import smoke, step_times, steps, timeline, tune, verdict
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.lm_head.exp_product import form

interpreted = pytest.mark.skipif(
    triton_backend.missing() is not None or torch.cuda.is_available(), reason="plays Triton's kernels on the CPU"
)


def step(name: str, code: str, seconds: float = 30.0, needs: str = "") -> steps.Step:
    return steps.Step(name, seconds, [sys.executable, "-c", code], needs=needs)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs one step with so many seconds left; returns its outcome and what the log holds."""
    monkeypatch.setattr(steps, "LEAST", 0.5)

    def run_it(one: steps.Step, left: float = 60.0) -> tuple[steps.Outcome, str]:
        with (tmp_path / "run.log").open("w") as log:
            outcome = steps.run(one, time.monotonic() + left, log, {})
        return outcome, (tmp_path / "run.log").read_text()

    return run_it


def test_a_step_shows_its_lines_and_keeps_them(run, capfd):
    outcome, log = run(step("smoke", "import sys; print('one'); print('two', file=sys.stderr)"))
    assert outcome.is_good and outcome.words == "done"
    assert "one\n" in log and "two\n" in log and "one\n" in capfd.readouterr().out


def test_a_failure_is_an_outcome(run):
    outcome, _ = run(step("smoke", "raise SystemExit(3)"))
    assert not outcome.is_good and outcome.words == "failed with exit code 3"


def test_a_step_is_stopped_at_its_limit_with_all_that_it_started(run):
    child = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome, log = run(step("tune", code, seconds=3.0))
    assert outcome.words == "stopped at its limit of 3 s" and not outcome.is_good
    assert outcome.seconds < 15
    assert has_ended(int(log.split()[-1]))


def has_ended(number: int, within: float = 20.0) -> bool:
    """A killed process takes a moment to end."""
    moment, end = threading.Event(), time.monotonic() + within
    while psutil.pid_exists(number) and time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return True
        moment.wait(0.05)
    return not psutil.pid_exists(number)


def test_no_step_begins_after_the_end_or_without_its_program(run):
    outcome, _ = run(step("steps", "print('never')"), left=0.1)
    assert outcome.words == "not started: the time of the run is up" and not outcome.is_good
    outcome, log = run(step("sanitize", "print('never')", needs="no-such-program"))
    assert outcome.words == "left out: no-such-program is not installed" and outcome.is_good
    assert "never" not in log


@pytest.mark.parametrize("second", [False, True])
def test_the_limits_of_the_steps_are_near_that_of_the_run(second):
    planned = steps.steps(Path("out"), second, dry_run=True)
    assert [one.name for one in planned] == [name for name in steps.NAMES if name in {one.name for one in planned}]
    assert sum(one.seconds for one in planned) <= 1.15 * (300 if second else 420)  # few take all of their limit


@interpreted
@pytest.mark.parametrize("part", [smoke, timeline, tune, step_times], ids=lambda part: part.__name__.split(".")[-1])
def test_a_dry_run_of_a_part_leaves_the_files_that_it_names(part, tmp_path, capsys):
    assert part.main(["--out", str(tmp_path), "--dry-run"]) == 0
    assert (tmp_path / steps.HEADLINES).read_text().strip()
    for path in tmp_path.glob("*.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert (rows or path.name == "ledger.csv") and all(None not in row.values() for row in rows)
    if part is tune:
        (written,) = json.loads((tmp_path / "tuned/cpu.json").read_text()).values()
        assert written.keys() >= form.row_of("any other").keys()
        assert written["proved"] is None
    assert {path.name for path in tmp_path.glob("*.csv")} <= {"timeline.csv", "ledger.csv", "tuning.csv", "steps.csv"}


def test_the_kernels_of_a_step_are_sorted_into_the_phases_of_the_ledger():
    names = [
        "scale_rows",
        "gemm a",
        "token_logp_delta",
        "preference_loss",
        "gemm b",
        "scale_rows",
        "gemm c",
        "scale_to",
    ]
    found = list(timeline.kernels("head", "cuda", [(name, 10.0 * n, 1e3 * (n + 1)) for n, name in enumerate(names)]))
    of = {"before the first product": 1, "logits": 2, "rows of logits": 3, "other, forward": 4, "dh": 5, "dW": 7}
    assert timeline.phases(found) == of | {"other, backward": 6 + 8}
    assert set(timeline.phases(found)) <= set(ledger.PHASES)
    assert timeline.phases(found[:-3]) == {}


def lay_out(folder: Path, times: dict[str, dict[str, float]]) -> Path:
    (folder / "tuned").mkdir()
    row = folder / "tuned/sm_90.json"
    row.write_text(json.dumps({"sm_90": form.row_of("sm_90")}))
    with (folder / "steps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(step_times.Figure._fields)
        for head, of in times.items():
            for name, ms in of.items():
                writer.writerow([head, "trained", name, 4096, ms, ms, 1.0, 1.0, 1.0, 700.0])
    return row


FASTER = {"a": {"cuda": 2.0, "triton": 1.9, "triton_exp": 1.5}, "b": {"cuda": 4.0, "triton_exp": 3.9}}
SLOWER = FASTER | {"b": {"cuda": 4.0, "triton": 3.5, "triton_exp": 3.9}}


@pytest.mark.parametrize(
    ("times", "is_right", "words", "is_proved"),
    [
        (FASTER, True, "right and faster (a 0.79, b 0.97)", True),
        (SLOWER, True, "not the faster everywhere", False),
        (FASTER, False, "smoke or tests failed", False),
        ({}, True, "not the faster everywhere", False),
    ],
    ids=["right and faster", "slower on one head", "wrong", "no step"],
)
def test_a_default_is_proposed_only_for_what_is_right_and_faster(times, is_right, words, is_proved, tmp_path):
    row = lay_out(tmp_path, times)
    assert words in verdict.verdict(tmp_path, is_right)
    (written,) = json.loads(row.read_text()).values()
    assert (written["proved"] is not None) == is_proved
    if is_proved:
        assert set(written["proved"]) == {"device", "date", "torch", "triton"}


def test_a_run_that_did_not_get_so_far_proves_nothing(tmp_path):
    assert "did not come to an end" in verdict.verdict(tmp_path, True)
