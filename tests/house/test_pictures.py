"""Pictures: one style, a message that says the numbers, and nothing degenerate where there is little to draw."""

from __future__ import annotations

import random
import sys
from collections import Counter

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch

from wrpo.building.picture import draw_rewards
from wrpo.building.report import BuildReport
from wrpo.demo.report import Judged, draw_bars
from wrpo.demo.skills import SKILLS, tasks
from wrpo.evaluation.comparison import compare
from wrpo.evaluation.picture import draw
from wrpo.picture_style import ANSWERS, GREEN, MODELS, WIDTH, picture
from wrpo.training.curves import draw_curves

RANDOM = random.Random(0)


def coin(share: float) -> float:
    return float(RANDOM.random() < share)


def report(reward, models: str, *, sft: bool = True, triples: bool = True) -> BuildReport:
    """Of 50 rows of each kind, whose rewards are `reward(mean)`; each model has won 10 prompts."""
    made = BuildReport(won=Counter(dict.fromkeys(models, 10)))
    kinds = [("SFT answer", 0.8)] * sft
    kinds += [("source_chosen", 0.8), ("target_chosen", 0.6), ("rejected", 0.2)] * triples
    for answer, mean in kinds:
        made.sample[answer] = [reward(mean) for _ in range(50)]
    return made


def scores(share: float) -> dict[str, list[float]]:
    return {f"p{number}": [float(number < 20 * share)] for number in range(20)}


def log(**values: float) -> list[dict]:
    return [{"step": step} | {key.replace("__", "/"): value / step for key, value in values.items()} for step in (1, 2)]


def test_every_picture_is_as_wide_and_leaves_matplotlib_as_it_was(tmp_path, drawn):
    before = dict(matplotlib.rcParams)
    titles = ("short", "a title of many words " * 20, "two\nlines")
    for title in titles:
        with picture(tmp_path / "a.png", title, height=2, note="a note") as figure:
            figure.subplots()
    assert dict(matplotlib.rcParams) == before
    assert [figure.get_size_inches()[0] for figure in drawn] == 3 * [WIDTH]
    for figure, title in zip(drawn, titles, strict=True):
        assert figure.get_suptitle().split() == title.split()
        assert max(map(len, figure.get_suptitle().splitlines())) < 100


def test_rewards_of_a_verifier_are_shares_at_zero_and_one(tmp_path, drawn):
    made = report(coin, "ab")
    assert draw_rewards(made, tmp_path / "rewards.png")
    rewards, gaps, _ = axes_of(drawn)
    shares = [sum(x == value for x in some) / 50 for some in made.sample.values() for value in (0, 1)]
    assert [bar.get_height() for bar in rewards.patches] == pytest.approx(shares)
    assert [text.get_text() for text in rewards.get_xticklabels()] == ["0", "1"]
    assert [text.get_text() for text in gaps.get_xticklabels()] in (["-1", "0", "1"], ["0", "1"])
    assert rewards.get_legend() is None  # it stands above, where it covers nothing


def test_rewards_of_a_reward_model_are_histograms(tmp_path, drawn):
    draw_rewards(report(lambda mean: RANDOM.gauss(mean, 0.2), "ab"), tmp_path / "rewards.png")
    rewards, gaps, _ = axes_of(drawn)
    for ax, kinds in ((rewards, 4), (gaps, 2)):
        assert [type(patch) for patch in ax.patches] == 2 * kinds * [StepPatch]


def test_differences_of_few_rewards_stay_few_whatever_floats_make_of_them(tmp_path, drawn):
    draw_rewards(report(lambda _: RANDOM.randrange(6) / 5, "ab"), tmp_path / "rewards.png")
    _, gaps, _ = axes_of(drawn)
    assert len(gaps.get_xticklabels()) <= 11


def test_one_source_has_no_shares_to_compare_and_sft_rows_alone_no_gaps(tmp_path, drawn):
    draw_rewards(report(coin, "a"), tmp_path / "rewards.png")
    draw_rewards(report(coin, "a", triples=False), tmp_path / "rewards.png")
    draw_rewards(report(coin, "abc", triples=False), tmp_path / "rewards.png")
    assert [len(axes_of([figure])) for figure in drawn] == [2, 1, 2]


def test_a_model_has_one_colour_in_all_panels_and_the_title_says_what_each_solves(tmp_path, drawn):
    solved = {"before": scores(0.1), "sft": scores(0.25), "wrpo": scores(0.5)}
    draw(tmp_path / "eval.png", compare(solved, solved_at=1), None)
    assert drawn[0].get_suptitle() == "Prompts solved: before 10%, sft 25%, wrpo 50%"
    worth, wins = axes_of(drawn)
    assert colours(worth) == list(MODELS[:3])
    assert colours(wins) == list(MODELS[1:3])


def test_one_model_on_one_group_is_a_bar_and_no_slab(tmp_path, drawn):
    draw(tmp_path / "eval.png", compare({"wrpo": scores(0.5)}, solved_at=1), None)
    (ax,) = axes_of(drawn)
    (bar,) = ax.patches
    low, high = ax.get_xlim()
    assert bar.get_width() < (high - low) / 5


def test_a_name_with_dollars_is_a_name_and_no_formula(tmp_path, drawn):
    names = ["$\\frac{$", "a_$b$"]
    assert draw_rewards(report(coin, names), tmp_path / "rewards.png")
    groups = dict.fromkeys(scores(0), "$x^{$")
    draw(tmp_path / "eval.png", compare({name: scores(0.5) for name in names}, groups=groups, solved_at=1), None)
    values = {f"source_weight/{name}": 1.0 for name in names}
    assert draw_curves([{"step": step, "loss": 1.0, **values} for step in (1, 2)], tmp_path / "curves.png")
    assert len(drawn) == 3


def test_a_demo_says_how_many_prompts_were_solved(tmp_path, drawn):
    asked = [task for skill in SKILLS for task in tasks(skill, held_out=True)[:2]]
    before = [Judged(task, "", 0.0) for task in asked]
    draw_bars(before, [Judged(task, "", 1.0) for task in asked[:3]] + before[3:], tmp_path / "before_after.png")
    assert drawn[0].get_suptitle() == f"0 of {len(asked)} held-out prompts solved before, 3 after"


def test_loss_and_rewards_of_a_run_come_first_and_largest(tmp_path, drawn):
    history = log(loss=1.0, learning_rate=1.0, grad_norm=1.0, rewards__rejected=1.0, rewards__accuracies=0.5, alpha=1.0)
    assert draw_curves(history, tmp_path / "curves.png")
    assert drawn[0].get_suptitle() == "Loss from 1 to 0.5 in 2 steps, 25% of the pairs won at the end"
    titles = [ax.get_title(loc="left") for ax in axes_of(drawn)]
    assert titles[:3] == ["loss", "implicit reward", "pairs won against rejected"]
    areas = [ax.bbox.width * ax.bbox.height for ax in axes_of(drawn)]
    assert titles[3:] == ["alpha", "gradient norm", "learning rate"] and min(areas[:3]) > max(areas[3:])


def test_what_a_run_is_and_what_it_learns_from_have_colours_of_their_own(tmp_path, drawn):
    draw_curves(log(loss=1.0, rewards__source_chosen=1.0, rewards__rejected=1.0), tmp_path / "curves.png")
    loss, rewards = axes_of(drawn)
    assert {line.get_color() for line in loss.lines} == {GREEN}
    assert {line.get_color() for line in rewards.lines if len(line.get_xdata())} == {
        ANSWERS["source"], ANSWERS["rejected"],
    }  # fmt: skip


def test_without_matplotlib_nothing_is_drawn_and_every_missing_picture_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_rewards(report(coin, "ab"), tmp_path / "rewards.png")
    assert not draw(tmp_path / "eval.png", compare({"wrpo": scores(0.5)}), None)
    assert not list(tmp_path.iterdir())
    for name in ("rewards.png", "eval.png"):
        assert f"{name} was not drawn: matplotlib is missing (pip install matplotlib)" in caplog.text


def axes_of(figures: list) -> list:
    """The panels of the first figure, from the top left."""
    return figures[0].subfigs[0].axes or [ax for part in figures[0].subfigs[0].subfigs for ax in part.axes]


def colours(ax) -> list[str]:
    return [to_hex(bar.get_facecolor()) for bar in ax.patches]
