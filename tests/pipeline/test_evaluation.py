"""Evaluation of answers: intervals that cover, wins that add up, tables and files that say the same."""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path
from statistics import NormalDist

import pandas
import pytest
from scripted_server import serving
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from wrpo import cli
from wrpo.data import DataError
from wrpo.evaluation.answers import read_answers, scores_of
from wrpo.evaluation.benchmark_files import write_alpaca_eval, write_arena_hard
from wrpo.evaluation.comparison import ALL, compare, wins, worth
from wrpo.evaluation.intervals import bootstrap_interval, wilson_interval
from wrpo.user_error import UserError


def answer(model: str, prompt_id: str, reward: float | None = None, sample: int = 0, **fields) -> dict:
    row = {"prompt_id": prompt_id, "prompt": f"question {prompt_id}", "model": model, "sample": sample}
    row |= {"response": f"{model} says {sample}"} | fields
    return row if reward is None else row | {"reward": reward}


def rows_in(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def before_and_after(tmp_path) -> list[str]:
    """Six prompts in two groups: `after` wins three, ties two and loses one."""
    scores = {"before": [0.0, 0.5, 0.2, 1.0, 0.3, 0.9], "after": [1.0, 1.0, 0.4, 1.0, 0.3, 0.1]}
    return [
        rows_in(
            tmp_path / f"{model}.jsonl",
            [answer(model, f"p{i}", reward, skill="ab"[i % 2]) for i, reward in enumerate(rewards)],
        )
        for model, rewards in scores.items()
    ]


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "trials"), [(0.5, 10), (0.9, 40), (0.25, 1000), (0.125, 4)])
def test_the_ends_of_a_wilson_interval_are_just_z_standard_errors_away(share, trials):
    z = NormalDist().inv_cdf(0.975)
    for end in wilson_interval(share, trials):
        assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials))


def test_a_wilson_interval_is_never_a_point_and_never_leaves_the_shares():
    for share, trials in product((0.0, 0.5, 1.0), (1, 2, 100)):
        low, high = wilson_interval(share, trials)
        assert 0 <= low < high <= 1
        assert low <= share <= high
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_a_wilson_interval_covers_the_true_share_as_often_as_it_says(p):
    # Exact, over the binomial: at n = 50 the coverage oscillates around 95 % by up to 3 % (Brown, Cai, DasGupta 2001).
    n = 50
    covered = 0.0
    for solved in range(n + 1):
        low, high = wilson_interval(solved / n, n)
        covered += math.comb(n, solved) * p**solved * (1 - p) ** (n - solved) * (low <= p <= high)
    assert 0.92 <= covered <= 0.98


def test_a_bootstrap_interval_is_that_of_the_normal_distribution_where_that_holds():
    # 400 equally spread values, so the mean's standard error is known; 2000 draws place each end to about 5 % of half
    # the width.
    values = [i / 399 for i in range(400)]
    half = NormalDist().inv_cdf(0.975) * math.sqrt((1 / 12) / 400)
    low, high = bootstrap_interval(values)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.1 * half), pytest.approx(0.5 + half, abs=0.1 * half))
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.25] * 10) == (0.25, 0.25)


def test_a_score_gain_of_fewer_than_ten_prompts_has_no_interval(before_and_after, tmp_path, capsys):
    assert bootstrap_interval([0.0, 1.0] * 4 + [0.5]) is None
    assert cli.main(["eval", *before_and_after, "-o", str(tmp_path / "out")]) == 0
    assert (
        json.loads((tmp_path / "out/eval.json").read_text())["answers"]["wins"]["after"]["all"]["gain_interval"] is None
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after")]
    assert line.endswith("+0.150")


# -- comparison -------------------------------------------------------------------------------------------------------


def test_a_tie_counts_half_and_every_win_of_one_is_the_others_loss():
    one = {"a": [1.0], "b": [0.5], "c": [0.2], "d": [0.0]}
    other = {"a": [0.0], "b": [0.5], "c": [0.3], "d": [1.0]}
    won, lost = wins(one, other, list(one)), wins(other, one, list(one))
    assert won.win_rate == (1 + 0.5 + 0 + 0) / 4
    assert won.win_rate + lost.win_rate == 1
    assert (won.better, won.worse) == (lost.worse, lost.better) == (1, 2)
    assert won.score_gain == pytest.approx((1.0 + 0 - 0.1 - 1.0) / 4)
    assert won.score_gain == pytest.approx(-lost.score_gain)


def test_a_prompt_counts_once_however_many_answers_it_has():
    many = {"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0]}
    own = worth(many, ["a", "b"], solved_at=1.0)
    assert own.solved == pytest.approx((3 / 4 + 0) / 2)
    assert own.mean_score == pytest.approx(own.solved)
    assert own.solved_interval == wilson_interval(own.solved, 2)
    pairs = wins(many, {"a": [1.0, 0.5], "b": [0.0]}, ["a", "b"])
    # Of the 8 pairs on "a": each 1.0 ties one and beats one; 0.0 loses both.
    assert pairs.win_rate == pytest.approx(((3 * 1.5) / 8 + 0.5) / 2)


def test_models_are_compared_on_the_prompts_that_all_have_answered():
    scores = {"x": {"a": [1.0], "b": [0.0]}, "y": {"b": [1.0], "c": [1.0]}, "z": {"b": [0.0]}}
    found = compare(scores, baseline="y")
    assert found.left_out == 2
    assert {model: by_group[ALL].prompts for model, by_group in found.worth.items()} == {"x": 1, "y": 1, "z": 1}
    assert {model: by_group[ALL].win_rate for model, by_group in found.wins.items()} == {"x": 0.0, "z": 0.0}
    with pytest.raises(UserError, match="no prompt that x, y have all answered"):
        compare({"x": {"a": [1.0]}, "y": {"b": [1.0]}})
    with pytest.raises(UserError, match="baseline: expected one of x, y, z, got 'w'"):
        compare(scores, baseline="w")


def test_the_groups_share_out_all_prompts():
    scores = {"x": {"a": [1.0], "b": [0.0], "c": [1.0]}}
    found = compare(scores, groups={"a": "easy", "b": "hard", "c": "easy"}, solved_at=1.0)
    assert {group: (one.prompts, one.solved) for group, one in found.worth["x"].items()} == {
        ALL: (3, pytest.approx(2 / 3)),
        "easy": (2, 1.0),
        "hard": (1, 0.0),
    }
    assert found.baseline is None
    assert found.wins == {}


# -- answers ----------------------------------------------------------------------------------------------------------

BAD_ANSWERS = {
    "no model": (answer("m", "a", 1.0) | {"model": " "}, "field 'model': expected text that is not empty"),
    "no response": (answer("m", "a", 1.0) | {"response": None}, "field 'response': expected text"),
    "a reward of NaN": (answer("m", "a", float("nan")), "field 'reward': expected a finite number"),
    "a reward in words": (answer("m", "a") | {"reward": "good"}, "field 'reward': expected a finite number"),
    "a sample of 1.5": (answer("m", "a", 1.0) | {"sample": 1.5}, "field 'sample': expected a whole number"),
    "another prompt under the same id": (
        answer("m", "a", 1.0) | {"prompt": "something else"},
        "field 'prompt': expected the prompt of 'a', got 'something else'",
    ),
    "the same sample twice": (answer("good", "a", 1.0), "a second sample 0 of 'good' for 'a'"),
}


@pytest.mark.parametrize(("row", "words"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_is_named_with_its_row(tmp_path, row, words):
    path = rows_in(tmp_path / "answers.jsonl", [answer("good", "a", 1.0), row])
    with pytest.raises(DataError, match=f"answers.jsonl, row 2, .*{words}|row 2, field 'sample': .*{words}"):
        read_answers([path])


def test_an_empty_answer_counts_and_an_unscored_one_is_not_guessed(tmp_path):
    path = rows_in(tmp_path / "a.jsonl", [answer("m", "a", 0.0) | {"response": ""}, answer("m", "b")])
    answers = read_answers([path])
    assert answers[0].response == ""
    with pytest.raises(DataError, match=r"expected a reward, got none for 'm' on 'b'. Run `wrpo score`"):
        scores_of(answers)


# -- benchmark files --------------------------------------------------------------------------------------------------


def test_alpaca_eval_finds_instruction_output_and_generator(tmp_path):
    rows = [answer("org/my model", "a", sample=1), answer("org/my model", "a"), answer("org/my model", "b")]
    rows[2]["response"] = "Größe 😀 \u2028 end"
    (path,) = write_alpaca_eval(read_answers([rows_in(tmp_path / "a.jsonl", rows)]), tmp_path / "out")
    assert path == tmp_path / "out/org_my_model/model_outputs.json"
    read = pandas.read_json(path)  # as alpaca_eval 0.6.6 reads it
    assert read.to_dict("records") == [
        {"instruction": "question a", "output": "org/my model says 0", "generator": "org/my model"},
        {"instruction": "question b", "output": "Größe 😀 \u2028 end", "generator": "org/my model"},
    ]


def test_arena_hard_finds_each_answer_under_its_question(tmp_path):
    rows = [answer(model, uid, category="math") for model in ("x", "org/y") for uid in ("q1", "q2")]
    questions, *answers = write_arena_hard(read_answers([rows_in(tmp_path / "a.jsonl", rows)]), tmp_path / "out")
    assert [path.name for path in answers] == ["x.jsonl", "org_y.jsonl"]
    by_uid = {row["uid"]: row for row in map(json.loads, questions.read_bytes().splitlines())}
    assert {uid: (row["prompt"], row["category"]) for uid, row in by_uid.items()} == {
        "q1": ("question q1", "math"),
        "q2": ("question q2", "math"),
    }
    for path in answers:  # its judge takes the model's name from the file and reads just these fields
        for line in map(json.loads, path.read_bytes().splitlines()):
            assert line["model"] == path.stem
            assert line["uid"] in by_uid
            assert line["messages"][0] == {"role": "user", "content": by_uid[line["uid"]]["prompt"]}
            assert line["messages"][-1]["content"]["answer"].endswith("says 0")


def test_what_a_benchmark_cannot_read_is_refused(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    talk = read_answers([rows_in(tmp_path / "talk.jsonl", [answer("m", "a") | {"prompt": turns}])])
    for write in (write_alpaca_eval, write_arena_hard):
        with pytest.raises(UserError, match=r"prompt 'a': .* single user turn, got user, assistant, user"):
            write(talk, tmp_path / "out")
    alike = read_answers([rows_in(tmp_path / "alike.jsonl", [answer("a/b", "a"), answer("a:b", "a")])])
    with pytest.raises(UserError, match="'a/b' and 'a:b' would share the file name 'a_b'"):
        write_alpaca_eval(alike, tmp_path / "out")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_the_same_numbers_and_a_picture(before_and_after, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["eval", *before_and_after, "-o", str(out), "--group-by", "skill", "--solved-at", "1"]) == 0
    shown = capsys.readouterr().out
    measured = json.loads((out / "eval.json").read_text())["answers"]
    assert measured["worth"]["before"]["all"]["solved"] == pytest.approx(1 / 6)
    assert measured["worth"]["after"]["all"]["solved"] == pytest.approx(3 / 6)
    won = measured["wins"]["after"]["all"]
    assert (won["win_rate"], won["better"], won["worse"]) == (pytest.approx((3 + 2 / 2) / 6), 3, 1)
    assert set(measured["worth"]["after"]) == {"all", "a", "b"}
    (line,) = [line for line in shown.splitlines() if line.startswith("after") and " all " in line]
    low, high = won["win_interval"]
    assert f"{won['win_rate']:.1%} [{low:.1%}, {high:.1%}]" in line
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "eval.png") in shown


def test_one_model_alone_has_no_wins(before_and_after, tmp_path, capsys):
    assert cli.main(["eval", before_and_after[0], "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "wins over" not in shown
    assert "solved" not in shown  # nothing says what solved is
    assert (tmp_path / "out/eval.png").exists()


def test_an_export_needs_no_scores(tmp_path, capsys):
    path = rows_in(tmp_path / "a.jsonl", [answer("m", "a"), answer("m", "b")])
    arguments = ["eval", path, "-o", str(tmp_path / "out"), "--export", "alpaca-eval", "arena-hard"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "out/alpaca_eval/m/model_outputs.json").exists()
    assert (tmp_path / "out/arena_hard/model_answer/m.jsonl").exists()
    assert (tmp_path / "out/arena_hard/question.jsonl").exists()
    assert "arena-hard" in capsys.readouterr().out


VERIFIER = """
def longer_is_better(prompt, response):
    return len(response) / 100

def refuses_b(prompt, response):
    if prompt == "question b":
        raise ValueError("no b")
    return 1.0
"""


@pytest.fixture
def unscored(tmp_path, monkeypatch) -> list[str]:
    """Two files of answers without rewards, in the current folder, beside a module of verifiers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_rewards.py").write_text(VERIFIER)
    return [rows_in(tmp_path / f"{name}.jsonl", [answer(name, p) for p in "abc"]) for name in ("short", "longer")]


def test_a_verifier_named_here_scores_the_answers_once(unscored, capsys):
    arguments = ["eval", *unscored, "-o", "out", "--verifier", "my_rewards:longer_is_better"]
    assert cli.main(arguments) == 0
    measured = json.loads(Path("out/eval.json").read_text())
    assert measured["answers"]["worth"]["longer"]["all"]["mean_score"] == pytest.approx(len("longer says 0") / 100)
    assert measured["answers"]["wins"]["longer"]["all"]["win_rate"] == 1.0
    assert measured["settings"]["solved_at"] == 1.0
    scored = Path("out/scored.jsonl").read_bytes()
    assert cli.main(arguments) == 0
    assert Path("out/scored.jsonl").read_bytes() == scored
    assert "0 new answers" in capsys.readouterr().out


def test_a_folder_used_again_reports_this_calls_answers_and_no_others(unscored, capsys):
    scorer = ["--verifier", "my_rewards:longer_is_better"]
    assert cli.main(["eval", *unscored, "-o", "out", *scorer]) == 0
    again = rows_in(Path("again.jsonl"), [answer("longer", "a") | {"response": "drawn again"}])
    assert cli.main(["eval", again, "-o", "out", *scorer]) == 0
    worth = json.loads(Path("out/eval.json").read_text())["answers"]["worth"]
    assert {model: one["all"]["prompts"] for model, one in worth.items()} == {"longer": 1}
    assert worth["longer"]["all"]["mean_score"] == pytest.approx(len("drawn again") / 100)


def test_a_folder_used_again_with_other_prompts_or_fewer_samples_reports_what_was_asked_now(unscored, capsys):
    rows_in(Path("prompts.jsonl"), [{"prompt_id": p, "prompt": f"question {p}"} for p in "bac"])
    rows_in(Path("fewer.jsonl"), [{"prompt_id": p, "prompt": f"question {p}"} for p in "ac"])
    with serving() as server:
        Path("sources.yaml").write_text(json.dumps([{"model": "m", "kind": "server", "base_url": server.url}]))
        asking = ["eval", "-o", "out", "--sources", "sources.yaml", "--export", "alpaca-eval", "--prompts"]
        assert cli.main([*asking, "prompts.jsonl", "--samples", "2"]) == 0
        # The verifier fails on prompt b, which this call does not ask about.
        assert cli.main([*asking, "fewer.jsonl", "--verifier", "my_rewards:refuses_b"]) == 0
    assert len(Path("out/scored.jsonl").read_bytes().splitlines()) == 2
    measured = json.loads(Path("out/eval.json").read_text())["answers"]
    assert measured["worth"]["m"]["all"]["prompts"] == 2
    assert len(json.loads(Path("out/alpaca_eval/m/model_outputs.json").read_text())) == 2


def test_an_answer_that_got_no_reward_stops_the_evaluation(unscored, capsys):
    assert cli.main(["eval", *unscored, "-o", "out", "--verifier", "my_rewards:refuses_b"]) == 2
    assert "scored.jsonl: some answers have no reward" in capsys.readouterr().err
    assert not Path("out/eval.json").exists()


def test_a_reward_model_named_here_decides_the_wins(unscored, capsys):
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, initializer_range=0.5, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("judge")
    tokenizer.save_pretrained("judge")
    arguments = [
        "eval",
        *unscored,
        "-o",
        "out",
        "--reward-model",
        "judge",
        "--batch-size",
        "2",
        "--export",
        "alpaca-eval",
    ]
    assert cli.main(arguments) == 0
    rewards = {(row["model"], row["prompt_id"]): row["reward"] for row in
               map(json.loads, Path("out/scored.jsonl").read_bytes().splitlines())}  # fmt: skip
    won = sum(rewards["longer", p] > rewards["short", p] for p in "abc") / 3
    measured = json.loads(Path("out/eval.json").read_text())["answers"]
    assert measured["wins"]["longer"]["all"]["win_rate"] == pytest.approx(won)
    assert measured["worth"]["longer"]["all"]["solved"] is None
    assert Path("out/alpaca_eval/longer/model_outputs.json").exists()
    capsys.readouterr()


def test_rewards_of_two_scorers_for_one_prompt_are_not_compared(unscored, capsys):
    rows = [json.loads(line) for path in unscored for line in Path(path).read_bytes().splitlines()]
    for path, scorers in (("two.jsonl", {"short": "rm", "longer": "judge"}), ("one.jsonl", {})):
        scored = [row | {"reward": 1.0, "scorer": scorers.get(row["model"], "rm")} for row in rows]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in scored))
    assert cli.main(["eval", "two.jsonl", "-o", "out"]) == 2
    assert "field 'scorer': expected rewards of one scorer, 'rm', for 'a', got 'judge'" in capsys.readouterr().err
    assert cli.main(["eval", "one.jsonl", "-o", "out"]) == 0


MISTAKES = {
    "nothing": (["-o", "out"], "nothing to evaluate"),
    "no output": (["a.jsonl"], "output: expected a value, got none"),
    "a mistyped flag": (
        ["a.jsonl", "-o", "out", "--verifer", "m:f"],
        "no setting named 'verifer'; did you mean 'verifier'?",
    ),
    "models that are asked nothing": (["-o", "out", "--sources", "s.yaml"], "sources and prompts go together"),
    "two scorers": (["a.jsonl", "-o", "out", "--verifier", "m:f", "--judge", "j.yaml"], "got judge and verifier"),
    "half of the triples": (
        ["-o", "out", "--triples", "t.jsonl", "--policy", "p"],
        "triples needs policy and reference",
    ),
    "an export of nothing": (
        ["-o", "out", "--triples", "t", "--policy", "p", "--reference", "r", "--export", "arena-hard"],
        "export needs files of answers",
    ),
    "an unknown benchmark": (
        ["a.jsonl", "-o", "out", "--export", "mt-bench"],
        "export: expected one of alpaca-eval, arena-hard, got 'mt-bench'",
    ),
    "a folder that is a file": (["a.jsonl", "-o", "a_file"], "output: expected a folder, got the file a_file"),
    "a folder below a file": (
        ["a.jsonl", "-o", "a_file/out"],
        "output: the folder a_file/out cannot be made: Not a dir",
    ),
    "a scorer without a name": (["a.jsonl", "-o", "out", "--judge", ""], "judge: expected a name, got ''"),
    "a file that is not there": (["nowhere.jsonl", "-o", "out"], "nowhere.jsonl: no such file"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    assert cli.main(["eval", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("wrpo eval: ")
    assert shown.count("\n") == 1
    assert words in shown
