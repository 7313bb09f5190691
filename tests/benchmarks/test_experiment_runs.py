"""The experiment end to end at toy size: really trained, killed and continued, reported."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from benchmarks.fusion import __main__ as command
from benchmarks.fusion import arms, models, seed
from benchmarks.fusion.seed import SeedRun, Size

TOY = Size(prompts=12, held_out=4, effort=0.02, sources=2)  # 5 to 18 steps of pre-training


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Batches of 8 and the arms that stand for all: target, SFT, DPO, WRPO."""
    monkeypatch.setattr(command, "QUICK", TOY)
    monkeypatch.setattr(models, "BATCH", 8)
    chosen = [arm for arm in arms.all_arms(2) if arm.name in ("target", "sft-2", "dpo-2", "wrpo-0.5-2")]
    monkeypatch.setattr(command, "all_arms", lambda _: chosen)
    yield
    datasets.enable_caching()  # the command switches it off for its whole process


def run(folder: Path, *more: str) -> int:
    return command.main(["--quick", "--threads", "1", "--out", str(folder), *more])


def results(folder: Path) -> dict[str, dict]:
    """Every result without what differs between any two runs."""
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "seed-1" / "results").glob("*.json")}
    for record in found.values():
        del record["seconds"], record["cpu_seconds"]
        for line in record.get("log", []):
            for key in [key for key in line if "per_second" in key or "runtime" in key]:
                del line[key]
    return found


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped_and_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    judge = SeedRun.judge

    def killed_after_training(self, model, tokenizer, name):
        if name == "dpo-2":
            raise Killed
        return judge(self, model, tokenizer, name)

    with monkeypatch.context() as patch:
        patch.setattr(SeedRun, "judge", killed_after_training)
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    kept = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    assert set(results(tmp_path / "killed")) == {"target", "sft-2"}
    with monkeypatch.context() as patch:
        patch.setattr(seed, "pretrain", None)  # every model is on the disk: training one again would be an error
        assert run(tmp_path / "killed") == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert run(tmp_path / "whole") == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    _the_report_shows_what_was_measured(tmp_path / "whole")


def _the_report_shows_what_was_measured(folder: Path) -> None:
    text = (folder / "fusion.md").read_text()
    for arm in results(folder):
        assert f"| {arm} |" in text
    assert "python -m benchmarks.fusion --quick --threads 1" in text
    assert (folder / "fusion_claims.png").stat().st_size > 10_000


def test_a_report_of_nothing_is_one_line_that_says_what_to_do(tmp_path, capsys):
    assert run(tmp_path, "--report") == 2
    assert "Run the experiment" in capsys.readouterr().err
