"""`wrpo sample`: what is asked, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from sampled import KEY, keys
from scripted_server import completion, serving

pytest_plugins = ("sampling_fixtures",)  # its fixtures


def test_every_model_answers_every_prompt_five_times_as_in_the_paper(sample, written):
    with serving() as one, serving() as two:
        assert sample([{"model": "a", "base_url": one.url}, {"model": "b", "base_url": two.url}], ["p", "q"]) == 0
        assert len(one.bodies) == len(two.bodies) == 10
        assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in one.bodies} == {(0.8, 0.95, 2048)}
        assert len({body["seed"] for body in one.bodies + two.bodies}) == 20, "every answer is drawn with its own seed"
    rows = written()
    assert keys(rows) == [(p, m, n) for p in "pq" for m in "ab" for n in range(5)]
    for row in rows:
        assert row["response"] == f"{row['prompt']} {row['seed']}", "the row holds the seed that drew its answer"
        assert (row["finish_reason"], row["temperature"], row["top_p"]) == ("stop", 0.8, 0.95)
        assert "reward" not in row


def test_the_same_command_draws_with_the_same_seeds(sample, written):
    with serving() as server:
        for name in ("one.jsonl", "two.jsonl"):
            assert sample([{"model": "a", "base_url": server.url}], ["p", "q"], output=name) == 0
        assert sample([{"model": "a", "base_url": server.url}], ["p", "q"], "--seed", "7", output="other.jsonl") == 0
    answers = [sorted(row["response"] for row in written(f"{name}.jsonl")) for name in ("one", "two", "other")]
    assert answers[0] == answers[1]
    assert not set(answers[0]) & set(answers[2])


def test_a_model_may_have_its_own_settings_and_the_server_its_own_words(sample):
    source = {
        "model": "a",
        "served_model": "org/a",
        "samples": 1,
        "temperature": 0,
        "max_tokens": 7,
        "extra_body": {"top_k": 5},
        "leave_out": ["seed", "top_p"],
    }
    with serving() as server:
        assert sample([{**source, "base_url": server.url}], ["p"]) == 0
    (body,) = server.bodies
    messages = [{"role": "user", "content": "p"}]
    assert body == {"model": "org/a", "messages": messages, "temperature": 0, "max_tokens": 7, "top_k": 5}


def test_messages_arrive_as_they_are_and_kept_fields_are_carried_on(sample, written):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}]
    row = {"prompt_id": "x", "prompt": messages, "skill": "sums", "answer": "5", "other": 1}
    with serving() as server:
        flags = ["--samples", "1", "--keep", "skill", "answer"]
        assert sample([{"model": "a", "base_url": server.url}], [row], *flags) == 0
    assert server.bodies[0]["messages"] == messages
    (answer,) = written()
    assert (answer["prompt"], answer["skill"], answer["answer"]) == (messages, "sums", "5")
    assert "other" not in answer


@pytest.mark.parametrize("again", ["{}/prompts.jsonl", "{}/./prompts.jsonl", "{}/p*s.jsonl", "{}/linked.jsonl"])
def test_a_prompts_file_named_twice_is_asked_once(again, sample, written, tmp_path):
    (tmp_path / "linked.jsonl").symlink_to("prompts.jsonl")
    with serving() as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p"], more=again.format(tmp_path)) == 0
    assert keys(written()) == [("p", "a", 0)]


def test_a_prompt_without_an_id_has_one_that_its_text_decides(sample, written):
    with serving() as server:
        for name in ("one.jsonl", "two.jsonl"):
            sample([{"model": "a", "base_url": server.url}], [{"prompt": "p"}, {"prompt": "q"}], output=name)
    assert keys(written("one.jsonl")) == keys(written("two.jsonl"))
    assert len({row["prompt_id"] for row in written("one.jsonl")}) == 2


def test_an_answer_that_the_limit_cut_says_so(sample, written, capsys):
    with serving(lambda body, attempt: completion("half an ans", "length")) as server:
        assert sample([{"model": "a", "base_url": server.url}], ["p"], "--samples", "2") == 0
    assert [row["finish_reason"] for row in written()] == ["length", "length"]
    assert capsys.readouterr().out.split("not asked")[1].split()[:6] == ["a", "0", "2", "2", "0", "0"]


def test_shards_share_the_prompts_out_and_leave_none(sample, written):
    prompts = [f"prompt {n}" for n in range(40)]
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        for shard in range(3):
            assert sample([source], prompts, "--shard", f"{shard}/3", output=f"{shard}.jsonl") == 0
    parts = [{row["prompt_id"] for row in written(f"{shard}.jsonl")} for shard in range(3)]
    assert sorted(prompt for part in parts for prompt in part) == sorted(prompts)
    assert all(5 <= len(part) <= 22 for part in parts), "about a third each"


def test_bad_prompts_are_left_out_where_asked_and_repeated_ones_are_asked_once(sample, written, capsys):
    with serving() as server:
        flags = ["--samples", "1", "--skip-bad-rows"]
        assert sample([{"model": "a", "base_url": server.url}], ["p", {"prompt": 5}, "p", "q"], *flags) == 0
    assert keys(written()) == [("p", "a", 0), ("q", "a", 0)]
    assert "2 prompts; 1 bad row skipped (prompt 1" in capsys.readouterr().out


def test_the_examples_sources_are_sources(monkeypatch):
    from wrpo.sampling.sources import KINDS, read_sources

    monkeypatch.setenv("BIG_MODEL_KEY", KEY)
    sources = read_sources(Path(__file__).resolve().parent.parent.parent / "examples" / "sources.yaml")
    assert {type(source) for source in sources} == set(KINDS.values())
