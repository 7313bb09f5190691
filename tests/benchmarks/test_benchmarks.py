"""The benchmarks measure what they say: no number of a wrong result, a true floor, files that come back."""

from __future__ import annotations

import math
import re
from multiprocessing.process import BaseProcess

import pytest
import torch
from cost import product_flops

from benchmarks import run
from benchmarks.suite import commits, machine, measure, results, scenarios, tables, timing
from benchmarks.suite.accuracy import Truth
from benchmarks.suite.contestants import CONTESTANTS, FLOOR, FUSED
from benchmarks.suite.measure import checked, errors_of_one_step, measured
from benchmarks.suite.memory import MIB, Unaffordable, peak_of
from benchmarks.suite.problem import RANK, Problem, Setting
from benchmarks.suite.results import Figure, Row
from benchmarks.suite.rivals import PACKAGES, packaged
from benchmarks.suite.scenarios import Scenario
from benchmarks.suite.timing import Phases, step_of

TINY = Setting(97, 16, examples=2, sources=1, response=5, prompt=3)
HEADS = ("trained", "frozen", "lora", "no_grad")
FIRST, LAST = "<!-- benchmarks cpu -->", "<!-- /benchmarks cpu -->"
FACTS = {
    "machine": "a machine",
    "device": "cpu",
    "cores": "2, torch uses 2",
    "torch": "2.13",
    "date": "2026-01-02",
    "commit": "abc",
    "command": "python -m benchmarks.run",
    "copy_gbs": "10",
    "product_gflops_float32": "50",
}


def scaled_gradient(problem: Problem):
    """The right loss with gradients 1 % too large."""
    loss = FUSED.loss(problem)

    def wrong() -> torch.Tensor:
        value = loss()
        return value + 0.01 * (value - value.detach())

    return wrong


def raises(problem: Problem):
    def loss() -> torch.Tensor:
        raise RuntimeError("no such shape")

    return loss


@pytest.fixture
def fast_tiny_machine(monkeypatch):
    """Peaks without a process each, and a speed that no rule refuses."""
    monkeypatch.setattr(measure, "peak_of", lambda setting, rival, *rest: 1.0)
    monkeypatch.setattr(machine, "speed", lambda dtype, device: machine.Speed(1e12, 1e12, 1e12))
    monkeypatch.setattr(measure, "MOST", 3)


@pytest.mark.parametrize("head", HEADS)
def test_the_floor_runs_the_products_that_the_gradients_need_on_the_rows_that_count(head):
    setting = TINY._replace(head=head)
    assert product_flops(Problem(setting).products()) == setting.flops
    width = setting.width
    columns = {"trained": 3 * width, "lora": 2 * width + 3 * RANK, "frozen": 2 * width, "no_grad": width}[head]
    assert setting.flops == 2 * 30 * columns * 97


def test_the_same_setting_is_the_same_problem():
    one, other = Problem(TINY), Problem(TINY)
    for name, leaf in one.leaves().items():
        assert torch.equal(leaf, other.leaves()[name])
    assert torch.equal(one.labels, other.labels)


def test_the_weights_of_a_group_are_those_of_wrpo_and_dpo():
    assert Problem(TINY._replace(sources=0, examples=1)).seq_weight.tolist() == [1, -1]
    assert Problem(TINY._replace(sources=2, examples=1)).seq_weight.tolist() == [0.25, 0.25, 0.5, -1]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_loss_and_plain_torch_are_the_truth_rounded(head, dtype):
    problem = Problem(TINY._replace(head=head, dtype=dtype, softcap=2.0))
    truth = Truth(problem)
    for name in (FUSED.name, "plain torch"):
        errors = errors_of_one_step(problem, CONTESTANTS[name].loss(problem), truth)
        assert errors.too_large(dtype) is None
        assert (errors.dh is None) == (head == "no_grad")
        assert (errors.dW is None) == (head in ("no_grad", "frozen"))


def test_a_contestant_with_another_gradient_is_not_timed():
    problem = Problem(TINY)
    errors, wrong = checked(problem, {"right": FUSED.loss(problem), "wrong": scaled_gradient(problem)})
    assert list(errors) == ["right"]
    assert wrong["wrong"].startswith("not timed: dh is off by 0.01")


def test_a_rival_that_fails_is_left_out_with_its_words_and_our_own_failure_ends_the_run():
    problem = Problem(TINY)
    _, wrong = checked(problem, {"rival": raises(problem)})
    assert wrong == {"rival": "failed: RuntimeError: no such shape"}
    with pytest.raises(RuntimeError, match="no such shape"):
        checked(problem, {FUSED.name: raises(problem)})


def test_forward_and_backward_are_timed_apart_and_add_up():
    problem = Problem(TINY)
    phases = step_of(problem, FUSED.loss(problem))()
    assert phases.forward > 0 and phases.backward > 0
    assert phases.both == phases.forward + phases.backward
    assert problem.weight.grad is not None


def test_a_size_beyond_the_time_of_a_point_is_skipped_with_both_times(monkeypatch):
    monkeypatch.setattr(machine, "speed", lambda dtype, device: machine.Speed(1e3, 1e3, 1e3))
    (row,) = measured("scenario", "point", TINY, [FUSED], "cpu", 20.0)
    assert row.figure.note.startswith("skipped: about ")
    assert "of 20 s that one point may take; to time it pass --allow " in row.figure.note


def test_a_size_beyond_the_memory_is_skipped_with_both_sizes(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1 << 30)
    why = machine.why_too_large(TINY._replace(vocabulary=1 << 20, width=4096), "cpu")
    assert why is not None and "GiB" in why and "1.0 GiB are free" in why


def test_the_peak_of_a_step_is_what_it_allocates_beside_inputs_and_gradients():
    setting = Setting(20000, 16, response=200)
    logits = 4 * setting.num_rows * setting.vocabulary / MIB  # 31 MiB
    peak = peak_of(setting, CONTESTANTS["plain torch"], "cpu", None, 120.0)
    assert 2 * logits < peak < 4.5 * logits  # logits, their log_softmax, the gradient of each


def test_a_step_that_outlasts_the_patience_ends_with_the_reason():
    with pytest.raises(Unaffordable, match="takes more than 0 s"):
        peak_of(TINY, FUSED, "cpu", None, 0.0)


def test_a_process_that_answered_ends_by_itself_and_so_leaks_no_semaphores(monkeypatch):
    exits = []
    monkeypatch.setattr(BaseProcess, "kill", lambda process: exits.append(process.exitcode))
    peak_of(TINY, FUSED, "cpu", None, 120.0)
    assert exits == [0]


def test_a_run_writes_its_rows_as_they_come_then_a_table_and_pictures(tmp_path, fast_tiny_machine):
    points = {f"V={v}": TINY._replace(vocabulary=v) for v in (61, 131)}
    scenario = Scenario("vocabulary", "growing", points, ("fused", "plain torch", "quack"), "vocabulary")
    file = results.ResultFile(tmp_path / "here.csv", FACTS)
    run.run({"vocabulary": scenario}, "cpu", [], 60.0, file, [])
    run.publish(file.path, readme=False)
    facts, rows = results.read(file.path)
    assert facts == FACTS
    timed = [row.figure for row in rows if row.figure.p50_ms]
    assert [f.contestant for f in timed] == 2 * ["fused", "plain torch", FLOOR]
    assert all(f.times_floor == 1 for f in timed if f.contestant == FLOOR)
    assert all(f.p20_ms <= f.p50_ms <= f.p80_ms for f in timed)
    assert {row.figure.note for row in rows if row.figure.contestant == "quack"} != {""}
    assert "| fused |" in (tmp_path / "here.md").read_text()
    assert (tmp_path / "here_vocabulary.png").stat().st_size > 10_000


def test_a_row_comes_back_from_the_file_as_it_was_written(tmp_path):
    row = Row(Figure("s", "a, b", "fused", rounds=3, p50_ms=1.5, error_dW=2e-7), TINY._replace(softcap=30.0))
    file = results.ResultFile(tmp_path / "one.csv", FACTS)
    file.add(row)
    assert results.read(file.path) == (FACTS, [row])


def test_a_resumed_run_keeps_finished_points_and_measures_the_others(tmp_path, fast_tiny_machine, monkeypatch):
    points = {f"V={v}": TINY._replace(vocabulary=v) for v in (61, 131)}
    scenario = {"vocabulary": Scenario("vocabulary", "growing", points, ("fused",), "vocabulary")}
    path = tmp_path / "here.csv"
    run.run(scenario, "cpu", [], 60.0, results.ResultFile(path, FACTS), [])
    cut_off = path.read_text().splitlines()[:-1]  # the floor of the last point is missing: it was not finished
    path.write_text("\n".join(cut_off) + "\n")
    done = run.finished_rows(path, FACTS)
    assert {row.figure.point for row in done} == {"V=61"}
    seen = []
    monkeypatch.setattr(run, "measured", lambda scenario, point, *rest: seen.append(point) or [])
    run.run(scenario, "cpu", [], 60.0, results.ResultFile(path, FACTS), done)
    assert seen == ["V=131"]
    assert results.read(path)[1] == done
    with pytest.raises(SystemExit, match="of another commit"):
        run.finished_rows(path, FACTS | {"commit": "def"})


def test_only_the_same_command_is_resumed_whatever_it_tests_or_shows(tmp_path):
    path = tmp_path / "here.csv"
    row = Row(Figure("s", "a", FLOOR, p50_ms=1.0), TINY)
    results.ResultFile(path, FACTS).add(row)
    again = {"command": f"{FACTS['command']} --resume --skip-tests"}
    assert run.finished_rows(path, FACTS | again) == [row]
    with pytest.raises(SystemExit, match="of another command; without --resume it is moved aside"):
        run.finished_rows(path, FACTS | {"command": f"{FACTS['command']} --full"})


def test_the_same_command_twice_keeps_both_files_and_resumed_it_keeps_one(tmp_path, fast_tiny_machine, monkeypatch):
    monkeypatch.setattr(run, "speeds", lambda *_: {"copy_gbs": "10", "product_gflops_float32": "50"})
    monkeypatch.setattr(scenarios, "toys", lambda: {"tiny": TINY})
    command = ["run", "--device", "cpu", "--scenario", "toy", "--only", "plain torch", "--skip-tests"]
    for more in ([], [], ["--resume"]):
        monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path), *more])
        run.main()
    written = sorted(file.stem for file in tmp_path.glob("*.csv"))
    assert len(written) == 2 and written[0].endswith("_toy") and written[1] == f"{written[0]}_1"


def test_rivals_that_are_not_installed_are_listed_once_with_the_way_to_have_them(
    tmp_path, fast_tiny_machine, capsys, monkeypatch
):
    monkeypatch.setitem(PACKAGES, "no_such_module", "no-such-package")
    monkeypatch.setitem(CONTESTANTS, "absent", packaged("absent", "no_such_module.part", FUSED.loss))
    points = {f"V={v}": TINY._replace(vocabulary=v) for v in (61, 131)}
    scenario = Scenario("vocabulary", "growing", points, ("fused", "absent"), "vocabulary")
    file = results.ResultFile(tmp_path / "here.csv", FACTS)
    run.run({"vocabulary": scenario}, "cpu", [], 60.0, file, [])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "absent" in line)
    assert line == 'not installed: absent (no-such-package); pip install -e ".[bench]" brings all that run on a CPU'
    notes = [row.figure.note for row in results.read(file.path)[1] if row.figure.contestant == "absent"]
    assert notes == 2 * ["no-such-package is not installed: pip install 'no-such-package'"]


def test_a_peak_below_nothing_is_zero_and_a_short_run_is_said_in_words():
    assert [tables.whole_number(peak) for peak in (None, -0.3, 0.4, -1.6, 99.5)] == ["", "0", "0", "-2", "100"]
    figure = Figure("s", "p", "fused", p20_ms=1.0, p50_ms=1.0, p80_ms=1.0, times_floor=1.0, peak_mib=-0.3)
    assert run.line(Row(figure, TINY)).endswith(" 0 MiB")
    assert [run.spoken(m) for m in (0.1, 0.7, 1.5)] == ["under a minute", "about a minute", "about 2 minutes"]


def test_the_readme_table_goes_between_its_markers_and_nowhere_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{FIRST}\nold\n{LAST}\nafter\n")
    ours = Figure("heads", "SmolLM2", "fused", rounds=3, p50_ms=10.0, times_floor=1.1, times_fused=1.0, peak_mib=100.0)
    plain = ours._replace(contestant="plain torch", p50_ms=20.0, times_fused=2.0, peak_mib=900.0)
    for _ in range(2):  # the second time it replaces the first
        lines = tables.summary(FACTS, [Row(ours, TINY), Row(plain, TINY)], "results/here.md", "results/here_prompt.png")
        tables.put_into_readme(readme, "cpu", lines)
    text = readme.read_text()
    assert text.startswith(f"before\n{FIRST}\n") and text.endswith(f"{LAST}\nafter\n")
    assert "old" not in text
    assert text.count("| SmolLM2, N = 30 | 10 ms | 1.10 | 2.00 x (plain torch) | 2.00 x | 100 MiB | 900") == 1
    assert "![time and memory: prompt](results/here_prompt.png)" in text


def test_the_readme_of_the_benchmarks_gets_the_table_with_links_from_its_own_folder(tmp_path, monkeypatch):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    readme = tmp_path / "benchmarks" / "README.md"
    readme.write_text(f"{FIRST}\n{LAST}\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    ours = Figure("heads", "SmolLM2", "fused", rounds=3, p50_ms=10.0, times_floor=1.1, times_fused=1.0, peak_mib=100.0)
    file = results.ResultFile(tmp_path / "benchmarks" / "results" / "here.csv", FACTS)
    file.add(Row(ours, TINY))
    run.publish(file.path, readme=True)
    text = readme.read_text()
    assert "| SmolLM2, N = 30 | 10 ms |" in text
    assert "[Every contestant on every problem](results/here.md)" in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables_of_the_readme_are_those_of_the_files_that_they_name(device):
    folder = machine.ROOT / "benchmarks"
    block = (folder / "README.md").read_text().split(f"<!-- benchmarks {device} -->\n")[1]
    block = block.split(f"\n<!-- /benchmarks {device} -->")[0]
    (table,) = re.findall(r"\((results/[^)]+\.md)\)", block)
    pictures = re.findall(r"\((results/[^)]+\.png)\)", block)
    facts, rows = results.read((folder / table).with_suffix(".csv"))
    assert block == "\n".join(tables.summary(facts, rows, table, *pictures))
    assert all((folder / file).is_file() for file in (table, *pictures))


def test_a_readme_without_markers_is_left_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must hold one"):
        tables.put_into_readme(readme, "cpu", ["table"])
    assert readme.read_text() == "nothing here\n"


def test_the_scenarios_hold_what_the_comparison_promises():
    full = scenarios.full(512, "float32")
    settings = [setting for scenario in full.values() for setting in scenario.points.values()]
    assert {(s.vocabulary, s.width) for s in settings} >= set(scenarios.HEADS.values())
    assert {s.head for s in settings} == set(HEADS)
    assert {s.sources for s in settings} >= {0, 1, 4}
    assert {s.dtype for s in settings} == {"float32", "bfloat16"}
    assert {s.response for s in full["response"].points.values()} >= {64, 8192}
    shares = [s.prompt / (s.prompt + s.response) for s in full["prompt"].points.values()]
    assert shares == pytest.approx([0.0, 0.3, 0.6, 0.9], abs=0.002)
    budgets = [s.budget_mib for s in full["budget"].points.values()]
    assert min(budgets) == 64 and max(budgets) == 4096
    assert all(name in CONTESTANTS for scenario in full.values() for name in scenario.contestants or ())


def test_two_trees_are_compared_in_turns():
    here = {"base": machine.ROOT, "checkout": machine.ROOT}
    shown = commits.compared(TINY, here, "cpu", allowance=5.0)
    assert "base " in shown and "checkout / base = " in shown


@pytest.mark.parametrize("other", ["base", "checkout"])
def test_each_tree_is_compared_with_its_own_kernels(other, tmp_path, capfd):
    (tmp_path / "wrpo_kernels.py").write_text("raise ImportError('kernels of the other tree')\n")
    trees = {"base": machine.ROOT, "checkout": machine.ROOT} | {other: tmp_path}
    with pytest.raises(SystemExit, match="one side of the comparison failed"):
        commits.compared(TINY, trees, "cpu", allowance=5.0)
    assert capfd.readouterr().err.count("ImportError: kernels of the other tree") == 1


def test_far_contestants_stop_after_the_fewest_rounds_and_close_ones_go_on(monkeypatch):
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    seconds = {"fused": 1.0, "close": 1.9, "far": 2.1, FLOOR: 0.3}
    steps = {name: (lambda taken=taken: Phases(taken, 0.0)) for name, taken in seconds.items()}
    taken = measure.rounds_within(steps, deadline=math.inf)
    rounds = {name: len(phases) for name, phases in taken.items()}
    assert rounds == {"fused": 7, "close": 7, "far": 3, FLOOR: 7}
    assert timing.ratio(taken["far"], taken["fused"]) == pytest.approx(2.1)
    assert {len(phases) for phases in measure.rounds_within(steps, deadline=0.0).values()} == {3}


def test_the_median_of_an_even_number_of_steps_lies_between_the_middle_two():
    p20, p50, p80 = timing.milliseconds([0.004, 0.001, 0.002, 0.003])
    assert p50 == pytest.approx(2.5) and 1 < p20 < 2 < 3 < p80 < 4
    assert timing.milliseconds([0.001]) == pytest.approx((1.0, 1.0, 1.0))
