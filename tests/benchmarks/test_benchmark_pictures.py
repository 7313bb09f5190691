"""Pictures of benchmarks: drawn again from their files, the same colours everywhere, titles that say the figures."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks import gpu, growth, whole_steps
from benchmarks.fusion import __main__ as fusion
from benchmarks.fusion.pictures import CLAIM, draw_claims
from benchmarks.fusion.report import claim_table, claims
from benchmarks.fusion.results import Results
from benchmarks.fusion.skills import SKILLS
from benchmarks.suite import dated_table, machine
from benchmarks.suite.contestants import CONTESTANTS, FUSED
from benchmarks.suite.pictures import colour, message
from benchmarks.suite.problem import Setting
from benchmarks.suite.results import Figure, Row
from benchmarks.suite.scenarios import Scenario
from benchmarks.suite.step_figures import headline
from wrpo.picture_style import GREEN

STEP = whole_steps.Figure(
    "Llama", "pairs", 0, 0, "float32", "fused", "shared", 9, 600.0, 300.0, 200.0, 400.0, 1.0, 1.0, 1.0, 1024.0, 0.5
)
PLAIN = STEP._replace(contestant="full logits", tokens_s=150.0, tokens_s_low=100.0, times_fused=2.0, peak_mib=2048.0)
TRL = PLAIN._replace(contestant="TRL DPOTrainer", times_fused=3.0, peak_mib=1280.0)
DRAWN = {
    whole_steps: [STEP, PLAIN, TRL],
    growth: [growth.Figure("N", 10 * k, 3, 1.0 * k, 2.0 * k, 3.0 * k, 5.0 + k % 2) for k in (1, 2, 4)],
    gpu: [
        gpu.Figure(scenario, name, 1.0, 2.0, 3.0, 4.0, "GB/s", ratio, 0.0)
        for scenario in ("forward bfloat16 V=9", "delta_ bfloat16 V=9", "loss, trained head")
        for name, ratio in (("products", 1.0), ("cuda", 1.25), ("triton", 1.5))
    ],
}


@pytest.fixture
def facts(monkeypatch) -> dict[str, str]:
    monkeypatch.setattr("sys.argv", ["a command"])
    return machine.facts("cpu")


@pytest.mark.parametrize("benchmark", DRAWN, ids=lambda module: module.__name__)
def test_the_file_of_a_benchmark_is_all_that_its_picture_needs(benchmark, tmp_path, facts, monkeypatch):
    path = dated_table.write(DRAWN[benchmark], facts, tmp_path, "some")
    parser = ArgumentParser()
    dated_table.add_draw(parser, benchmark.Figure)
    assert parser.parse_args(["--draw", str(path)]).draw == (path.with_suffix(".png"), facts, DRAWN[benchmark])
    monkeypatch.setattr("sys.argv", ["command", "--draw", str(path), "--out", str(tmp_path)])
    assert not benchmark.main()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_file_of_another_benchmark_is_refused_in_one_line(tmp_path, facts, capsys, monkeypatch):
    path = dated_table.write(DRAWN[gpu], facts, tmp_path, "gpu")
    for given, message_ in ((path, "no column axis"), (tmp_path / "nothing", "No such file")):
        monkeypatch.setattr("sys.argv", ["growth", "--draw", str(given), "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            growth.main()
        assert message_ in capsys.readouterr().err.splitlines()[-1]


def test_a_contestant_has_one_colour_in_all_pictures_and_ours_is_nobody_elses():
    assert colour("fused") == GREEN
    assert [name for name in CONTESTANTS if colour(name) == GREEN] == [FUSED.name]
    assert colour("TRL fused head") == colour("TRL selective") == colour("TRL DPOTrainer")
    assert colour("plain torch") == colour("full logits")


def test_the_title_of_a_sweep_says_the_figures_of_its_last_point():
    scenario = Scenario("response", "longer responses", {}, axis="response")
    ours = Figure("response", "9 tokens", "fused", p50_ms=1.0, times_fused=1.0, peak_mib=20.0)
    plain = ours._replace(contestant="plain torch", times_fused=2.0, peak_mib=80.0)
    short, long = Setting(99, 8, response=3), Setting(99, 8, response=9)
    rows = [Row(plain._replace(point="3 tokens", times_fused=9.0), short), Row(ours, long), Row(plain, long)]
    said = "Longer responses: wrpo 2.0 times as fast as plain torch at 9 tokens, in 25% of its memory"
    assert message(rows, scenario) == said
    assert message(rows[:2], scenario) == "Longer responses"


def test_the_title_of_whole_steps_compares_with_trl_and_without_it_with_plain_torch():
    said = "A whole DPO step with wrpo: {} times as fast as with {}, in {} of the memory"
    assert headline([STEP, PLAIN, TRL]) == said.format("3.0", "TRL", "80%")
    assert headline([STEP, PLAIN]) == said.format("2.0", "plain torch", "50%")
    other = [row._replace(model="tiny", times_fused=1.5) for row in (STEP, TRL)]
    assert headline([STEP, TRL, *other]) == said.format("1.5 to 3.0", "TRL", "80%")


def test_the_claims_drawn_are_those_of_the_table():
    solved = {"target": 0, "sft-2": 3, "dpo-2": 1, "wrpo-0.5-2": 2}
    records = [
        {"seed": seed, "arm": arm, "solved": {skill: [1] * (n + seed) + [0] * (9 - n - seed) for skill in SKILLS}}
        for seed in (1, 2) for arm, n in solved.items()
    ]  # fmt: skip
    results = Results(records)
    measured = [(c.words, str(c.gain).split(" ± ")[0], c.verdict) for c in claims(results, 2) if c.gain]
    found = CLAIM.findall(claim_table(results, 2))
    assert len(found) > 2 and [(words, mean, verdict) for words, mean, _, verdict in found] == measured
    one_seed = CLAIM.findall(claim_table(Results(records[:4]), 2))
    assert {(half, verdict) for _, _, half, verdict in one_seed} == {("", "one seed")}


def test_the_published_report_has_fourteen_claims_and_a_picture_of_them(tmp_path, drawn):
    published = Path(__file__).parents[2] / "docs/fusion.md"
    report = tmp_path / "fusion.md"
    report.write_text(published.read_text())
    assert draw_claims(report) == tmp_path / "fusion_claims.png"
    assert drawn[0].get_suptitle() == "Of 14 claims: 1 repeats, 12 undecided, 1 the opposite"
    assert f"]({published.with_name('fusion_claims.png').name})" in published.read_text()
    assert published.with_name("fusion_claims.png").exists()


def test_a_report_without_claims_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "a.md").write_text("| target | 35.6 ± 15.0 | -8.6 ± 6.2 | 38 | 5 |\n")
    assert fusion.main(["--draw", str(tmp_path / "a.md")]) == 2
    assert fusion.main(["--draw", str(tmp_path / "nothing.md")]) == 2
    assert capsys.readouterr().err.count("expected a report with a table of claims") == 2
