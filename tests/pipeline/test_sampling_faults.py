"""`wrpo sample` against servers that misbehave: every failure is counted, and costs no other answer."""

from __future__ import annotations

import pytest
from sampled import keys
from scripted_server import completion, echo, said, serving

pytest_plugins = ("sampling_fixtures",)  # its fixtures


RAW = '{"choices": [{"message": {"content": "never ends'
TEMPORARY = {
    "too many requests": (429, {"error": {"message": "slow down"}}),
    "too many requests, with a time to wait": (429, {"error": {"message": "slow down"}}, {"retry-after": "0.02"}),
    "an error of the server": (500, {"error": {"message": "out of memory"}}),
    "an error page": (502, "<html>Bad gateway</html>", {"content-type": "text/html"}),
    "a page that is no error": (200, "<html>hello</html>", {"content-type": "text/html"}),
    "broken JSON": (200, RAW),
    "JSON of something else": (200, {"hello": 1}),
    "a list": (200, "[1, 2]"),
    "no choices": (200, {**completion("x"), "choices": []}),
    "an empty answer": (200, completion("")),
    "spaces": (200, completion(" \n")),
    "a null": (200, completion(None)),
    "half a surrogate pair": (200, completion("\ud83d")),
    "a number for a text": (200, completion(5)),
    "brackets in brackets": (200, '{"choices": ' + "[" * 200_000),
    "thousands of digits": (200, '{"created": ' + "9" * 5000 + "}"),
}


def test_what_may_pass_is_tried_again(sample, written):
    with serving(lambda body, attempt: TEMPORARY[said(body)] if attempt < 2 else echo(body, attempt)) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], [*TEMPORARY]) == 0
        assert server.asked() == dict.fromkeys(TEMPORARY, 3)
    assert keys(written()) == sorted((fault, "a", 0) for fault in TEMPORARY)


def test_what_does_not_pass_costs_its_own_request_and_status_3(sample, written, capsys):
    def script(body, attempt):
        return TEMPORARY.get(said(body)) or echo(body, attempt)

    prompts = [word for fault in TEMPORARY for word in (fault, f"no {fault}")]
    fine = [prompt for prompt in prompts if prompt not in TEMPORARY]
    with serving(script) as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        assert sample([source], prompts) == 3
        assert server.asked() == dict.fromkeys(fine, 1) | dict.fromkeys(TEMPORARY, 3)
        assert keys(written()) == sorted((prompt, "a", 0) for prompt in fine)
        shown = capsys.readouterr()
        for words in ("429: ", "500: ", "502: ", "not the JSON of a chat completion", "an empty answer", "surrogate"):
            assert words in shown.err
        assert "(3 tries)" in shown.out
        server.script = echo
        assert sample([source], prompts) == 0
        assert server.asked() == dict.fromkeys(fine, 1) | dict.fromkeys(TEMPORARY, 4)
    assert keys(written()) == sorted((prompt, "a", 0) for prompt in prompts)


def test_an_empty_answer_is_asked_again_with_another_seed(sample, written):
    with serving(lambda body, attempt: completion("") if attempt == 0 else echo(body, attempt)) as server:
        sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p"])
    first, second = (body["seed"] for body in server.bodies)
    assert first != second
    assert written()[0]["seed"] == second


def test_a_server_that_hangs_costs_the_time_out_and_nothing_else(sample, written, capsys):
    with serving(lambda body, attempt: server.hang() if said(body) == "bad" else echo(body, attempt)) as server:
        source = {"model": "a", "base_url": server.url, "samples": 1, "timeout": 0.3, "retries": 1}
        assert sample([source], ["p", "bad", "q"]) == 3
    assert keys(written()) == [("p", "a", 0), ("q", "a", 0)]
    assert "failed 1: a: no answer within 0.3 s (2 tries)" in capsys.readouterr().out


def test_a_request_that_the_server_refuses_is_asked_once(sample, written, capsys):
    def script(body, attempt):
        return (400, {"error": {"message": "prompt too long"}}) if said(body) == "bad" else echo(body, attempt)

    with serving(script) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p", "bad"]) == 3
        assert server.asked() == {"p": 1, "bad": 1}
    assert "400: " in capsys.readouterr().out


WORDS = {
    "200 with a code": (200, {"error": {"code": 400, "message": "no such field"}}, "400: no such field"),
    "200 with a code in digits": (200, {"error": {"code": "400", "message": "no such field"}}, "400: no such field"),
    "200 without a code": (200, {"error": {"message": "on fire"}}, "an error inside the reply: on fire (2 tries)"),
    "200 with a word": (200, {"error": "on fire"}, "an error inside the reply: on fire (2 tries)"),
    "200 with a detail": (200, {"detail": "loading"}, "is not the JSON of a chat completion: loading (2 tries)"),
    "200 with a text": (200, "loading", "is not the JSON of a chat completion: loading (2 tries)"),
    "200 beside half an answer": (
        200,
        {"choices": [{**completion("half", "error")["choices"][0], "error": {"code": 502, "message": "lost"}}]},
        "502: lost (2 tries)",
    ),
    "FastAPI": (
        422,
        {"detail": [{"loc": ["body", "seed"], "msg": "not permitted"}, {"loc": ["body", 0], "msg": "odd"}]},
        "422: body.seed: not permitted; body.0: odd",
    ),
    "FastAPI, one word": (422, {"detail": "not permitted"}, "422: not permitted"),
    "a message": (400, {"object": "error", "message": "too\nlong"}, "400: too long"),
    "a word": (400, {"error": "too long"}, "400: too long"),
    "several": (400, {"errors": [{"message": "too long"}, "too wide"]}, "400: too long; too wide"),
    "a page": (400, "<p>no</p>", "400: <p>no</p>"),
    "nothing known": (400, {"reason_id": 17}, '400: {"reason_id": 17}'),
    "nothing": (400, "", "400: Error code: 400"),
}


@pytest.mark.parametrize(("status", "reply", "words"), WORDS.values(), ids=WORDS)
def test_the_servers_own_words_are_repeated(status, reply, words, sample, capsys):
    with serving(lambda body, attempt: (status, reply)) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1, "retries": 1}], ["p"]) == 3
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("where", ["message", "detail"])
def test_no_words_of_a_server_hold_the_key_or_more_than_a_line(where, sample, capsys, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-very-secret-0123456789")
    said = "bad key sk-very-secret-0123456789 " + 50 * "word "
    with serving(lambda body, attempt: (400, {"error": {where: said}})) as server:
        source = {"model": "a", "base_url": server.url, "api_key_env": "A_KEY", "samples": 1}
        assert sample([source], ["p"]) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed 1")]
    assert "400: bad key *** word" in line
    assert len(line) < 300


NO_MONEY = {
    "402": (402, {"error": {"message": "pay first"}}),
    "402 inside 200": (200, {"error": {"code": 402, "message": "pay first"}}),
    "429 for a quota": (429, {"error": {"code": "insufficient_quota", "message": "pay first"}}),
}


@pytest.mark.parametrize(("status", "reply"), NO_MONEY.values(), ids=NO_MONEY)
def test_an_account_with_nothing_left_ends_asking(status, reply, sample, capsys):
    with serving(lambda body, attempt: (status, reply)) as server:
        source = {"model": "a", "base_url": server.url, "samples": 1, "concurrency": 1}
        assert sample([source], ["p", "q", "r"]) == 3
        assert len(server.bodies) == 1
    assert "not asked 2: a: 4" in (shown := capsys.readouterr().out)
    assert "pay first" in shown


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_settings_end_asking_that_model_and_no_other(status, sample, written, capsys):
    with serving(lambda body, attempt: (status, {"error": {"message": "no"}})) as bad, serving() as good:
        sources = [{"model": "bad", "base_url": bad.url, "concurrency": 2}, {"model": "good", "base_url": good.url}]
        assert sample(sources, ["p", "q", "r"]) == 3
        assert len(bad.bodies) <= 2
    assert len(written()) == 15
    assert f"not asked {15 - len(bad.bodies)}: bad: {status}: " in capsys.readouterr().out


def test_a_dead_server_is_given_up_after_so_many_failures_in_a_row(sample, written, capsys):
    with serving() as gone:
        pass
    with serving() as good:
        dead = {"model": "dead", "base_url": gone.url, "give_up_after": 3, "concurrency": 1, "retries": 1}
        assert sample([dead, {"model": "good", "base_url": good.url}], ["p", "q", "r"]) == 3
    assert {row["model"] for row in written()} == {"good"}
    shown = capsys.readouterr().out
    assert f"failed 3: dead: no connection to {gone.url}" in shown
    assert "not asked 12: dead: 3 requests failed in a row" in shown


def test_a_continued_run_gets_past_the_requests_that_were_refused(sample, written):
    def script(body, attempt):
        bad = (400, {"error": {"message": "too long"}}) if int(said(body)) % 2 else completion("")
        return bad if int(said(body)) < 8 else echo(body, attempt)

    with serving(script) as server:
        source = {"model": "a", "base_url": server.url, "samples": 1, "give_up_after": 3, "concurrency": 1}
        assert sample([source], [f"{n}" for n in range(10)]) == 3
    assert keys(written()) == [("8", "a", 0), ("9", "a", 0)]
