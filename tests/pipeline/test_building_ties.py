"""`ties` source: where the target's answers are worth the same, a clearly better source answer still makes a row."""

from __future__ import annotations

import json
import math
import random

import pyarrow.parquet as pq
import pytest
from scored_answers import answers, write_lines

from wrpo import cli
from wrpo.building import BuildReport, BuildSettings, build_rows
from wrpo.data import DataError

TIED = answers("t", big=[0.5, 1.0], small=[0.75], target=[0.25, 0.25, 0.25])


def rows_of(rows: list[dict], **options) -> tuple[dict[str, dict], BuildReport]:
    """Rows by prompt id, all prompts in that part, and the report."""
    built = build_rows(rows, BuildSettings(**{"sft_share": 0, "ties": "source"} | options))
    return {row["prompt_id"]: row for row in built.triples}, built.report


def often_tied(prompts: int) -> list[dict]:
    """Two sources and the target with two answers each, worth 0, 1/2 or 1."""
    rng = random.Random(0)
    return [
        row
        for number in range(prompts)
        for row in answers(f"p{number}", **{m: [rng.randrange(3) / 2 for _ in range(2)] for m in ("a", "b", "target")})
    ]


def test_a_tie_becomes_a_row_of_the_best_source_and_the_last_tied_answer_without_a_target():
    rows, report = rows_of(TIED)
    assert rows["t"] == {
        "prompt_id": "t",
        "prompt": "question t",
        "source_chosen": ["t/big/1"],
        "source_model": ["big"],
        "source_weight": [1.0],
        "source_reward": [1.0],
        "rejected": "t/target/2",
        "rejected_reward": 0.25,
        "rejected_model": "target",
    }
    assert (report.triples, report.ties, report.dropped_prompts.total()) == (0, 1, 0)


def test_a_tie_gives_no_row_unless_asked_for():
    triple = answers("k", big=[1.0], target=[0.0, 0.5])
    built = build_rows(TIED + triple, BuildSettings(sft_share=0))
    assert [row["prompt_id"] for row in built.triples] == ["k"]
    assert built.report.dropped_prompts == {"no two answers of 'target' that differ in reward and text": 1}
    assert "ties" not in str(built.report)


def test_everything_else_stays_as_it_is_without_ties():
    rows = often_tied(80)
    with_ties = build_rows(rows, BuildSettings(ties="source"))
    without = build_rows(rows, BuildSettings())
    assert with_ties.sft == without.sft
    assert [row for row in with_ties.triples if "target_chosen" in row] == without.triples
    assert len(with_ties.triples) - len(without.triples) == with_ties.report.ties > 0


def test_one_answer_or_one_text_of_the_target_is_a_tie():
    alone = answers("a", big=[1.0], target=[0.0])
    same_text = answers("b", big=[1.0], target=[0.0, 0.0])
    same_text[2]["response"] = same_text[1]["response"] + "\n"
    rows, _ = rows_of(alone + same_text)
    assert {name: row["rejected"] for name, row in rows.items()} == {"a": "a/target/0", "b": "b/target/0"}


def test_answers_closer_than_the_least_target_gap_tie_and_their_worst_is_rejected():
    near = answers("n", big=[1.0], target=[0.25, 0.3125, 0.1875])
    rows, report = rows_of(near, min_target_gap=0.25)
    assert (rows["n"]["rejected"], rows["n"]["rejected_reward"]) == ("n/target/2", 0.1875)
    assert (report.triples, report.ties) == (0, 1)
    assert rows_of(near, min_target_gap=0.125)[1].triples == 1


def test_the_margin_is_to_the_best_of_the_tied_answers_and_just_reached_is_enough():
    near = answers("n", big=[0.75], target=[0.5, 0.25])
    keep = answers("k", big=[1.0], target=[0.0])
    assert "n" in rows_of(near + keep, min_target_gap=0.5, ties_margin=0.25)[0]
    rows, report = rows_of(near + keep, min_target_gap=0.5, ties_margin=0.375)
    assert list(rows) == ["k"]
    assert report.dropped_prompts == {"answers of 'target' tie and no source is better by 0.375": 1}


def test_only_sources_better_by_the_margin_are_kept_and_their_shares_sum_to_one():
    rows, _ = rows_of([*TIED, *answers("t", third=[0.7])], num_sources=3)
    assert rows["t"]["source_model"] == ["big", "small"]
    assert rows["t"]["source_weight"] == [0.5, 0.5]
    rows, _ = rows_of(TIED, num_sources=2, weight_temperature=0.5)
    assert rows["t"]["source_weight"] == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.5))], rel=1e-12)


def test_a_text_is_never_chosen_and_rejected_in_a_tie():
    tied = [row.copy() for row in TIED]
    tied[-1]["response"] = tied[1]["response"] + " "
    rows, _ = rows_of(tied, num_sources=2)
    assert (rows["t"]["source_model"], rows["t"]["rejected"]) == (["small"], "t/big/1 ")
    keep = answers("k", big=[1.0], target=[0.0])
    rows, report = rows_of(tied + keep)
    assert list(rows) == ["k"]
    assert report.dropped_prompts == {"source_chosen and rejected are one text": 1}


LEFT_OUT = {
    "poor source": ({"min_chosen_reward": 1.5}, "reward of source_chosen below 1.5"),
    "good rejected": ({"max_rejected_reward": 0.125}, "reward of rejected above 0.125"),
    "source gap": ({"min_source_gap": 0.875}, "source gap below 0.875"),
    "wide source gap": ({"max_source_gap": 0.5}, "source gap above 0.5"),
}


@pytest.mark.parametrize(("options", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_the_limits_of_triples_hold_for_ties(options, reason):
    with pytest.raises(DataError, match=f"at least one.*{reason} 1"):
        rows_of(TIED, **options)


def test_any_order_of_the_rows_gives_the_same_ties():
    rows, options = often_tied(60), BuildSettings(ties="source")
    expected = build_rows(rows, options)
    assert expected.report.ties
    random.Random(0).shuffle(rows)
    again = build_rows(rows, options)
    assert again.triples == expected.triples
    assert str(again.report) == str(expected.report)


def test_ties_are_counted_in_the_report_and_have_means_of_their_own():
    triple = answers("k", big=[0.75], target=[0.0, 0.5])
    _, report = rows_of(TIED + triple)
    assert str(report).startswith("9 candidates for 2 prompts -> 1 triples, 1 rows of ties; no bad rows\n")
    means = report.as_json()["means"]
    assert (means["source_chosen"]["reward"], means["source of tie"]["reward"]) == (0.75, 1.0)
    assert (means["rejected"]["reward"], means["tied answer"]["reward"]) == (0.0, 0.25)
    assert report.as_json()["ties"] == 1


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_command_writes_ties_among_the_triples(form, tmp_path, capsys):
    candidates = write_lines(often_tied(80), tmp_path / "candidates.jsonl")
    flags = ["--ties", "source", "--ties_margin", "0.75", "--format", form]
    assert cli.main(["build", str(candidates), "-o", str(tmp_path / "out"), *flags]) == 0
    built = build_rows(candidates, BuildSettings(ties="source", ties_margin=0.75))
    assert f"{built.report.ties} rows of ties" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ties"] == built.report.ties
    assert (tmp_path / "out" / "rewards.png").stat().st_size > 10_000
    path = tmp_path / "out" / f"triples.{form}"
    if form == "parquet":
        written = pq.read_table(path).to_pylist()
        assert [row["target_chosen"] for row in written] == [row.get("target_chosen") for row in built.triples]
        assert [row["rejected"] for row in written] == [row["rejected"] for row in built.triples]
    else:
        assert [json.loads(line) for line in path.read_text().splitlines()] == built.triples


def test_ties_alone_are_training_data(tmp_path):
    candidates = write_lines(TIED, tmp_path / "candidates.jsonl")
    command = ["build", str(candidates), "-o", str(tmp_path / "out"), "--sft_share", "0", "--ties", "source"]
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "triples.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_a_margin_that_is_not_above_zero_is_refused(margin):
    with pytest.raises(ValueError, match="ties_margin: expected"):
        BuildSettings(ties_margin=margin)


def test_ties_of_the_target_cannot_go_with_rejected_answers_of_a_source():
    with pytest.raises(ValueError, match="ties: source needs rejected target, got rejected source"):
        BuildSettings(ties="source", rejected="source")
