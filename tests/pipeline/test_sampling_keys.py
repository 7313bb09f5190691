"""A server's key is sent to that server, and stands in no row, log or message."""

from __future__ import annotations

import pytest
from sampled import FINE, KEY
from scripted_server import completion, echo, said, serving

pytest_plugins = ("sampling_fixtures",)  # its fixtures


def test_a_key_that_an_answer_repeats_is_not_written_nor_its_percent_encoding_said(
    sample, written, monkeypatch, capsys
):
    monkeypatch.setenv("BIG_KEY", "sk-a/b+c=0123456789")

    def script(body, attempt):
        fault = (400, {"error": {"message": "at /v1?key=sk-a%2fb%2Bc%3D0123456789"}})
        return completion("your key is sk-a/b+c=0123456789.") if said(body) == "p" else fault

    with serving(script) as server:
        source = {"model": "a", "base_url": server.url, "samples": 1, "api_key_env": "BIG_KEY"}
        assert sample([source], ["p", "q"]) == 3
    assert [row["response"] for row in written()] == ["your key is ***."]
    assert "0123456789" not in "".join(capsys.readouterr())


def test_a_placeholder_for_a_key_is_a_word_like_any_other(sample, written, monkeypatch):
    monkeypatch.setenv("NO_KEY", "EMPTY")
    with serving(lambda body, attempt: completion("The set is EMPTY.")) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1, "api_key_env": "NO_KEY"}], ["p"]) == 0
    assert written()[0]["response"] == "The set is EMPTY."


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_is_sent_and_appears_nowhere_else(status, sample, tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setenv("BIG_KEY", KEY)

    def script(body, attempt):
        return echo(body, attempt) if status == 200 else (status, {"error": {"message": f"bad key {KEY}, {KEY}"}})

    with serving(script) as server, caplog.at_level("DEBUG"):
        source = {"model": "a", "base_url": server.url, "samples": 2, "api_key_env": "BIG_KEY"}
        assert sample([source], ["p", "q"]) == (0 if status == 200 else 3)
    assert set(server.keys) == {KEY}
    shown = capsys.readouterr()
    texts = [shown.out, shown.err, caplog.text, *(path.read_text() for path in tmp_path.iterdir())]
    assert not any(KEY in text for text in texts)
    assert ("bad key ***" in shown.out) == (status != 200)


def test_a_server_without_a_key_is_not_sent_that_of_another(sample, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "our-organisation")
    with serving() as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p"]) == 0
    assert not any(KEY in value or "our-organisation" in value for value in server.headers[0].values())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"api_key": KEY}, "Keys come from the environment: api_key_env"),
        ({"api-key": KEY}, "Keys come from the environment: api_key_env"),
        ({"api_key_env": KEY}, "api_key_env: the variable that it names is not set"),
        ({"api_key_env": "hf_abcdefghij0123456789"}, "api_key_env: the variable that it names is not set"),
        ({"api_key_env": "NOT_SET_KEY"}, "api_key_env: NOT_SET_KEY is not set"),
        ({"base_url": f"http://user:{KEY}@127.0.0.1/v1"}, "base_url: must hold no user name and no password"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEY}"}, "base_url: must hold no '?...'"),
        ({"base_url": f"http://127.0.0.1/v1#{KEY}"}, "base_url: must hold no '#...'"),
        ({"timeout": KEY}, "entry 1: timeout: expected a number"),
        ({"concurrency": KEY}, "entry 1: concurrency: expected a whole number"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_repeating_it(entry, words, sample, capsys):
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1", **entry}], ["p"]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert KEY not in shown.err and "hf_abc" not in shown.err
    assert shown.err.count("\n") == 1


def test_only_models_that_are_asked_need_their_key(sample, monkeypatch):
    monkeypatch.delenv("NOT_SET_KEY", raising=False)
    with serving() as server:
        sources = [
            {"model": "a", "base_url": server.url, "samples": 1},
            {**FINE, "model": "b", "api_key_env": "NOT_SET_KEY"},
        ]
        assert sample(sources, ["p"], "--model", "a") == 0
    assert sample(sources, ["p"], "--model", "b") == 2
