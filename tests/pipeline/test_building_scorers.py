"""Rewards of two scorers are no one scale: never mixed without a word."""

from __future__ import annotations

import json

import pytest
from scored_answers import answers, write_lines

from wrpo import cli
from wrpo.building import BuildSettings, build_rows
from wrpo.data import DataError
from wrpo.user_error import UserError

A = answers("a", big=[0.9], target=[0.6, 0.1])
B = answers("b", big=[90.0], target=[60.0, 10.0])
TRIPLES = BuildSettings(sft_share=0)


def by(scorer: object, rows: list[dict]) -> list[dict]:
    return [row | {"scorer": scorer} for row in rows]


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("rows", [by("rm", A) + by("judge:j", B), by("rm", A[:1]) + by("judge:j", A[1:])])
def test_rewards_of_two_scorers_are_refused_with_both_names(rows, skip_bad_rows):
    words = r"rows, row \d, field 'scorer': expected 'rm', as in rows, row 1, got 'judge:j'.*--scorer any"
    with pytest.raises(UserError, match=words):
        build_rows(rows, BuildSettings(sft_share=0, skip_bad_rows=skip_bad_rows))


def test_a_row_that_names_no_scorer_is_of_another():
    with pytest.raises(UserError, match=r"expected no scorer, as in rows, row 1, got 'rm'"):
        build_rows(A + by("rm", B), TRIPLES)


def test_every_shard_refuses_a_second_scorer():
    for index in range(8):
        with pytest.raises(UserError, match="Rewards of two scorers"):
            build_rows(by("rm", A) + by("judge", B), BuildSettings(sft_share=0, shard=f"{index}/8"))


def test_one_scorer_can_be_chosen_and_the_rewards_of_others_are_counted():
    rows = by("rm", A) + by("judge", [row | {"reward": -row["reward"]} for row in A]) + B
    built = build_rows(rows, BuildSettings(sft_share=0, scorer="rm"))
    assert built.triples == build_rows(A, TRIPLES).triples
    assert built.report.dropped_answers == {"rewarded by another scorer": 6}
    with pytest.raises(DataError, match="rewarded by another scorer 9"):
        build_rows(rows, BuildSettings(scorer="nobody"))


def test_scales_that_somebody_knows_to_be_one_are_taken_together():
    built = build_rows(by("rm", A[:1]) + by("other", A[1:]), BuildSettings(sft_share=0, scorer="any"))
    assert built.triples == build_rows(A, TRIPLES).triples


def test_a_scorer_that_is_no_name_is_named():
    with pytest.raises(DataError, match=r"rows, row 1, field 'scorer': expected text, got 7"):
        build_rows(by(7, A), TRIPLES)


def test_what_two_runs_of_score_wrote_is_refused_together_and_taken_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "two_rewards.py").write_text("def short(p, r): return -len(r)\ndef last(p, r): return ord(r[-1])\n")
    write_lines(A, tmp_path / "answers.jsonl")
    for name in ("short", "last"):
        command = ["score", "answers.jsonl", "-o", f"{name}.jsonl", "--verifier", f"two_rewards:{name}"]
        assert cli.main(command) == 0
    build = ["build", "short.jsonl", "last.jsonl", "-o", "out", "--sft_share", "0", "--min_target_gap", "0"]
    assert cli.main(build) == 2
    assert "expected 'two_rewards:short', as in short.jsonl, row 1, got 'two_rewards:last'" in capsys.readouterr().err
    assert cli.main([*build, "--scorer", "two_rewards:last"]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "triples.jsonl").read_text().splitlines()]
    assert row["target_chosen"] == "a/target/1"
