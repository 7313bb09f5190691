"""The command line: the right command, an exit status that says how it ended, and mistakes in one line."""

from __future__ import annotations

import json
import logging
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from wrpo import __version__, cli

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": "a"}\n')
    mistakes = [
        ["trian"],
        ["train", "--bta", "1"],
        ["sft", str(tmp_path / "nowhere.yaml")],
        ["build", str(tmp_path / "bad.jsonl"), "-o", str(tmp_path / "out")],
        ["info", "please"],
    ]
    for arguments in mistakes:
        assert cli.main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("wrpo")
        assert shown.err.count("\n") == 1
        assert shown.out == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(arguments: list[str]) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "info", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["info"])


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied", "out"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
)
def test_an_output_that_cannot_be_written_is_one_line_and_status_2(error, monkeypatch, capsys):
    def full(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "info", full)
    assert cli.main(["info"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("wrpo info: cannot be read or written: ")
    assert shown.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is one of Linux")
def test_a_full_stdout_is_one_line_and_status_2():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "wrpo", "--help"]
        shown = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr == "wrpo: cannot be read or written: [Errno 28] No space left on device\n"


def test_a_reader_that_has_enough_ends_the_command_without_a_word():
    """`wrpo info | head`: the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "wrpo", "--help"]
        shown = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (141, "")


def test_the_version_is_one_line(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wrpo {__version__}\n"


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "info"])
def test_every_command_is_there_and_in_the_help_of_wrpo(name):
    assert callable(pkgutil.resolve_name(cli.COMMANDS[name]))
    assert f"wrpo {name} " in (cli.__doc__ or "")


def test_what_the_terminal_cannot_show_is_escaped():
    code = "from wrpo import cli; cli.info = lambda _: print('\u00e9'); cli.main(['info'])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout == "\\xe9\n"


def test_a_rank_that_is_no_number_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err.startswith("wrpo info: RANK: expected a whole number, got 'x'")


def test_a_missing_package_of_the_train_extra_says_what_to_install(monkeypatch, capsys):
    def broken(arguments: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr(cli, "info", broken)
    assert cli.main(["info"]) == 2
    assert "pip install 'wrpo[train]'" in capsys.readouterr().err


def test_help_and_mistyped_commands_load_nothing_heavy():
    code = "import sys; from wrpo.cli import main; main(['-h']); main(['trian']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "wrpo train CONFIG.yaml" in shown.stdout
    assert "did you mean 'train'?" in shown.stderr
    assert shown.stdout.splitlines()[-1] == "False"


def test_what_only_reads_and_chooses_rows_waits_for_no_torch(tmp_path):
    """Which takes seconds to load: `sample` and `score` ask other programs, `build` and `eval` count."""
    rows = [("s", 0, 0.9), ("target", 0, 0.5), ("target", 1, 0.1)]
    answers = [
        {"prompt_id": "a", "prompt": "p", "model": model, "sample": sample, "response": f"{reward}", "reward": reward}
        for model, sample, reward in rows
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    (tmp_path / "rewards.py").write_text("def one(prompt, response):\n    return 1.0\n")
    (tmp_path / "sources.yaml").write_text(
        "- {model: m, kind: server, base_url: 'http://127.0.0.1:9/v1', retries: 0}\n"
    )
    code = (
        "import sys; from wrpo.cli import main\n"
        "print([main(command.split()) for command in (\n"
        "    'build answers.jsonl -o built --sft-share 0',\n"
        "    'eval answers.jsonl -o evaluated --solved-at 0.5',\n"
        "    'score answers.jsonl -o scored.jsonl --verifier rewards:one',\n"
        "    'sample sources.yaml answers.jsonl -o sampled.jsonl')])\n"
        "print([name for name in ('torch', 'datasets') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-2:] == ["[0, 0, 0, 3]", "[]"], shown.stderr


def test_the_module_passes_its_status_on():
    shown = subprocess.run(
        [sys.executable, "-m", "wrpo", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "wrpo: no command 'trian'; did you mean 'train'?\n"


def test_info_is_the_report_of_the_kernels(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "torch " in shown
    assert "token_logp" in shown


def test_reports_are_those_of_the_first_process_alone(monkeypatch):
    logger = logging.getLogger("wrpo")
    for rank, is_said in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["info"]) == 0
        assert logger.isEnabledFor(logging.INFO) is is_said
