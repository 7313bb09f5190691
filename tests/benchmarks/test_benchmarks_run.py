"""`python -m benchmarks.run` measures nothing on a mistake, and destroys no figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks import run
from benchmarks.suite import machine, results, scenarios
from benchmarks.suite.arguments import FEWEST_ROWS

WRONG = {
    "no rows": (["--rows", "0"], "--rows: expected a whole number of at least 1, got '0'"),
    "rows that leave a response empty": (["--rows", "19"], "--rows: expected at least 20: fewer leave no response"),
    "negative threads": (["--threads", "-1"], "--threads: expected a whole number of at least 1, got '-1'"),
    "threads beyond reason": (["--threads", "99999999999"], "--threads: expected at most 1024, got 99999999999"),
    "no number of seconds": (["--allow", "nan"], "--allow: expected a number, got 'nan'"),
    "no seconds": (["--allow", "0"], "--allow: expected seconds > 0, got 0"),
    "a file that is not there": (["--draw", "nofile"], "--draw: cannot read nofile: No such file"),
    "a file of another kind": (["--draw", __file__], "--draw: expected a CSV file of benchmarks.run, got "),
    "no such commit": (["--base", "no-such-commit"], "--base: expected a commit of this repository, got"),
    "a folder under a file": (["--out", f"{__file__}/results"], "--out: cannot write into "),
    "a flag that a comparison of commits has no use for": (
        ["--base", "HEAD", "--only", "CCE", "--resume"],
        "--base: --only, --resume would do nothing beside it",
    ),
    "a flag that measures, beside none of it": (
        ["--draw", __file__, "--full", "--rows", "99"],
        "--draw: --full, --rows would do nothing beside it",
    ),
    "no such scenario": (["--scenario", "nothing"], "--scenario: invalid choice: 'nothing' (choose from "),
    "an empty commit": (["--base", ""], "--base: expected a commit of this repository, got ''"),
    "a mistyped flag": (["--ful"], "no flag --ful; did you mean --full?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flag_is_one_line_before_anything_runs(name, monkeypatch, capsys):
    flags, message = WRONG[name]
    monkeypatch.setattr(run, "pass_op_tests", lambda device: pytest.fail("the tests ran"))
    monkeypatch.setattr("sys.argv", ["run", *flags])
    with pytest.raises(SystemExit) as ended:
        run.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("benchmarks.run: ") and message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "--device", "cuda"])
    with pytest.raises(SystemExit):
        run.main()
    assert "sees no CUDA device here; use --device cpu\n" in capsys.readouterr().err


def test_the_fewest_rows_leave_no_response_empty():
    for rows in range(FEWEST_ROWS, 200):
        for chosen in (scenarios.full(rows, "float32"), scenarios.quick(rows, "float32")):
            assert all(s.response > 0 for scenario in chosen.values() for s in scenario.points.values()), rows


def test_red_op_tests_mean_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "OP_TESTS", ("tests/kernels/test_an_op_without_tests.py",))
    monkeypatch.setattr("sys.argv", ["run", "--scenario", "toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no numbers"):
        run.main()
    assert not list(tmp_path.iterdir())


def test_the_op_tests_that_run_first_are_there():
    assert all((machine.ROOT / file).is_file() for file in run.OP_TESTS)


def test_a_run_of_some_scenarios_has_a_file_of_its_own():
    facts = {"machine": "a machine", "device": "cpu", "date": "2026-01-02"}
    assert results.file_name(facts) == "cpu_a_machine_2026-01-02.csv"
    assert results.file_name(facts, ["toy", "heads", "toy"]) == "cpu_a_machine_2026-01-02_toy_heads.csv"


def test_a_file_that_a_run_would_write_over_is_moved_aside_and_never_lost(tmp_path, capsys):
    path = tmp_path / "here.csv"
    results.make_room(path)
    assert capsys.readouterr().out == ""
    for text in ("first", "second"):
        path.write_text(text)
        path.with_suffix(".png").write_text(text)
        results.make_room(path)
    assert capsys.readouterr().out.splitlines()[1] == f"{path} is of an earlier run: moved to here_2.csv"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "here_1.csv": "first",
        "here_1.png": "first",
        "here_2.csv": "second",
        "here_2.png": "second",
    }
