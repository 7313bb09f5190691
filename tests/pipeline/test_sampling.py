"""`wrpo sample` against servers that misbehave: every answer once, every failure counted, no key anywhere."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from scripted_server import completion, echo, said, serving

from wrpo import cli
from wrpo.rows.appending import AppendedRows
from wrpo.sampling.server import Pace, Server
from wrpo.sampling.sources import ServerSource
from wrpo.user_error import UserError

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def nothing_between_us_and_loopback(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def sample(tmp_path):
    """Runs `wrpo sample` on sources given as dicts and prompts given as texts or rows; returns the exit status."""

    def run(sources: list[dict], prompts: list, *flags: str, output: str = "out.jsonl", more: str | None = None) -> int:
        settings = [{"kind": "server", "retry_wait": 0.01, "retries": 2, **source} for source in sources]
        (tmp_path / "sources.yaml").write_text(json.dumps(settings))  # JSON is YAML
        rows = [{"prompt_id": p, "prompt": p} if isinstance(p, str) else p for p in prompts]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [str(tmp_path / name) for name in ("sources.yaml", "prompts.jsonl")]
        files += [*([more] if more else []), "-o", str(tmp_path / output)]
        return cli.main(["sample", *files, *flags])

    return run


@pytest.fixture
def written(tmp_path):
    def read(name: str = "out.jsonl") -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_bytes().splitlines()]

    return read


def keys(rows: list[dict]) -> list[tuple]:
    return sorted((row["prompt_id"], row["model"], row["sample"]) for row in rows)


# -- what is asked, and what is written -------------------------------------------------------------------------------


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


# -- what goes wrong on the way ---------------------------------------------------------------------------------------

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


# -- how fast ---------------------------------------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_asked_for(sample):
    with serving() as server:
        waiting = []

        def script(body, attempt):
            waiting.append(1)
            if len(waiting) >= 4:  # all four are here at once, or the test hangs until the time-out
                server.released.set()
            server.released.wait(5)
            return echo(body, attempt)

        server.script = script
        source = {"model": "a", "base_url": server.url, "concurrency": 4, "samples": 4}
        assert sample([source], ["p", "q", "r"]) == 0
        assert server.most_at_once == 4


def test_requests_start_no_faster_than_the_rate_limit(sample):
    with serving(lambda body, attempt: completion("") if attempt == 0 else echo(body, attempt)) as server:
        source = {"model": "a", "base_url": server.url, "requests_per_minute": 1200, "samples": 1}
        assert sample([source], [f"p{n}" for n in range(4)]) == 0
    # 8 requests, retries counted, 0.05 s apart; the first may be late on its way here by the time a request takes.
    assert len(server.times) == 8
    assert server.times[-1] - server.times[0] > 7 * 0.05 - 0.1


def test_a_pause_earns_no_burst():
    clock, starts = [0.0], []

    async def sleep(seconds: float) -> None:
        starts.append(clock[0] + seconds)

    async def play() -> None:
        pace = Pace(60, now=lambda: clock[0], sleep=sleep)  # one a second
        for when in (0.0, 0.0, 0.0, 10.0, 10.0):
            clock[0] = when
            await pace.turn()

    asyncio.run(play())
    assert starts == [0, 1, 2, 10, 11]


def test_a_server_that_says_when_to_come_again_is_not_asked_before(sample):
    slow_down = (429, {"error": {"message": "slow down"}}, {"retry-after": "0.4"})
    with serving(lambda body, attempt: slow_down if attempt == 0 else echo(body, attempt)) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p"]) == 0
    assert server.times[1] - server.times[0] > 0.35  # the first is noted when it arrives, later than it was sent


def test_waits_double_up_to_a_minute_and_up_to_half_of_each_is_chance():
    server = Server(ServerSource(model="a", base_url="http://127.0.0.1:1/v1", retry_wait=2.0))
    for attempt, longest in enumerate((2, 4, 8, 16, 32, 60, 60)):
        waits = [server._wait(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest < 0.9 * longest < max(waits) <= longest


# -- keys -------------------------------------------------------------------------------------------------------------


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
        ({"timeout": KEY}, "entry 1: argument --timeout: invalid float value"),
        ({"concurrency": KEY}, "entry 1: argument --concurrency: invalid int value"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_without_repeating_it(entry, words, sample, capsys):
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1", **entry}], ["p"]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert KEY not in shown.err and "hf_abc" not in shown.err
    assert shown.err.count("\n") == 1


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_twice_and_more_samples_only_the_new_ones(sample, written):
    with serving() as server:
        source = {"model": "a", "base_url": server.url}
        for samples, asked in ((2, 4), (2, 4), (3, 6)):
            assert sample([source], ["p", "q"], "--samples", str(samples)) == 0
            assert len(server.bodies) == asked
        assert sample([source, {"model": "b", "base_url": server.url}], ["p", "q"], "--samples", "3") == 0
        assert len(server.bodies) == 12
    assert keys(written()) == [(p, m, n) for p in "pq" for m in "ab" for n in range(3)]


def test_ctrl_c_is_one_line_and_status_130_and_keeps_what_was_answered(sample, written, monkeypatch, capsys):
    append = AppendedRows.append

    def interrupted(self, row):
        if row["sample"] == 3:
            raise KeyboardInterrupt
        append(self, row)

    with serving() as server:
        source = {"model": "a", "base_url": server.url, "concurrency": 1}
        monkeypatch.setattr(AppendedRows, "append", interrupted)
        assert sample([source], ["p"]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "wrpo sample: stopped"
        assert keys(written()) == [("p", "a", n) for n in range(3)]
        monkeypatch.undo()
        assert sample([source], ["p"]) == 0
    assert keys(written()) == [("p", "a", n) for n in range(5)]


def test_help_lists_every_field_of_every_kind(capsys):
    for command, names in (
        ("sample", ("requests_per_minute", "attn_implementation", "engine", "top_p")),
        ("score", ("pattern", "api_key_env", "--verifier")),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in names)


@pytest.mark.parametrize("left", [1, 5, 30, -2, -1])
def test_a_torn_last_line_is_cut_off_and_asked_again(left, sample, written, tmp_path, caplog):
    path = tmp_path / "out.jsonl"
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 3, "concurrency": 1}
        sample([source], ["p"])
        first, second, third = path.read_text().splitlines(keepends=True)
        path.write_text(first + second + third[:left])
        assert sample([source], ["p"]) == 0
        # Without its line end alone the last row is whole.
        assert len(server.bodies) == (3 if left == -1 else 4)
    assert keys(written()) == [("p", "a", 0), ("p", "a", 1), ("p", "a", 2)]


@pytest.mark.parametrize("content", ["a shopping list", '{"prompt": "p"}\n', '{"prompt_id": "p"\n', "[1]\n", "\0\0\0"])
def test_a_file_of_something_else_is_refused_and_left_alone(content, sample, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text(content)
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1"}], ["p"]) == 2
    assert (tmp_path / "out.jsonl").read_text() == content
    assert "out.jsonl, row 1" in capsys.readouterr().err


def test_an_output_that_another_process_writes_is_refused(sample, tmp_path, capsys):
    with serving() as server, AppendedRows(tmp_path / "out.jsonl"):
        assert sample([{"model": "a", "base_url": server.url}], ["p"]) == 2
        assert not server.bodies
    assert "another process is writing it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["a pipe", "a link to a device"])
def test_an_output_that_is_no_file_is_refused_before_it_is_opened(kind, sample, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/full")
    assert sample([{"model": "a", "base_url": "http://127.0.0.1:1/v1"}], ["p"]) == 2
    assert "out.jsonl: expected a regular file, got a pipe, socket or device" in capsys.readouterr().err


def test_a_file_system_without_locks_is_one_line_and_the_file_is_closed(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("wrpo.rows.appending.fcntl.flock", no_locks)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match="its file system has no locks: Operation not supported"):
        AppendedRows(tmp_path / "out.jsonl")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_last_line_of_brackets_in_brackets_is_torn_and_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"prompt_id": ' + "[" * 200_000)
    with AppendedRows(path):
        assert path.read_text() == ""


def test_answers_drawn_in_two_ways_do_not_share_a_file(sample, capsys):
    with serving() as server:
        source = {"model": "a", "base_url": server.url}
        assert sample([source], ["p"]) == 0
        assert sample([source], ["p", "q"], "--temperature", "1.0") == 2
        assert len(server.bodies) == 5
    assert "drawn with 1, as now, got 0.8" in capsys.readouterr().err


def test_a_prompt_that_has_changed_under_its_id_is_refused(sample, capsys):
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        assert sample([source], [{"prompt_id": "x", "prompt": "old"}]) == 0
        assert sample([source], [{"prompt_id": "x", "prompt": [{"role": "user", "content": "old"}]}]) == 0
        assert sample([source], [{"prompt_id": "x", "prompt": "new"}]) == 2
        assert len(server.bodies) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "out.jsonl, row 1, field 'prompt': expected the prompt that is now 'x', got 'old'" in shown


def test_a_full_disk_is_one_line_and_loses_no_answer(sample, tmp_path, written, monkeypatch, capsys):
    write, lines = os.write, []

    def full(file, data):
        if data.startswith(b'{"prompt_id"'):
            lines.append(data)
            if len(lines) == 3:
                write(file, data[:20])  # the part that still fitted
                raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("wrpo.rows.appending.os.write", full)
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "concurrency": 2}
        assert sample([source], ["p"]) == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        monkeypatch.undo()
        assert sample([source], ["p"]) == 0
    assert keys(written()) == [("p", "a", n) for n in range(5)]


def test_a_row_that_did_not_fit_leaves_nothing_for_the_next_to_stand_behind(tmp_path, monkeypatch):
    write = os.write

    def full(file, data):
        if b"long" in data:
            write(file, data[:20])
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("wrpo.rows.appending.os.write", full)
    with AppendedRows(tmp_path / "out.jsonl") as rows:
        rows.append({"prompt_id": "a"})
        with pytest.raises(UserError, match="No space left on device"):
            rows.append({"prompt_id": "b", "response": "long"})
        rows.append({"prompt_id": "c"})
        assert [row for _, row in rows] == [{"prompt_id": "a"}, {"prompt_id": "c"}]


# -- mistakes ---------------------------------------------------------------------------------------------------------

FINE = {"model": "a", "base_url": "http://127.0.0.1:1/v1"}
MISTAKES = {
    "a misspelt field": (
        [{**FINE, "concurency": 4}],
        ["p"],
        [],
        "entry 1: no setting named 'concurency'; did you mean",
    ),
    "text for a number": ([{**FINE, "timeout": "long"}], ["p"], [], "entry 1: argument --timeout: invalid float"),
    "out of range": ([{**FINE, "top_p": 0}], ["p"], [], "entry 1: top_p: expected more than 0"),
    "no model": ([{"base_url": "http://x/v1"}], ["p"], [], "entry 1: the following arguments are required: --model"),
    "no kind": ([{**FINE, "kind": None}], ["p"], [], "kind: expected one of server, transformers, vllm, got None"),
    "no address": ([{"model": "a"}], ["p"], [], "base_url: expected an address such as"),
    "no scheme": ([{**FINE, "base_url": "localhost:8000"}], ["p"], [], "base_url: expected an address such as"),
    **{
        f"an address {url!r}": ([{**FINE, "base_url": url}], ["p"], [], "base_url: expected an address such as")
        for url in ("http://x:99999/v1", "http://x:abc/v1", "http://x/\nv1", "http://[::1", "http://a..b/v1")
    },
    "a list of kinds": (
        [{**FINE, "kind": ["a"]}],
        ["p"],
        [],
        "entry 1: kind: expected one of server, transformers, vllm",
    ),
    "one name twice": ([FINE, FINE], ["p"], [], "two models are named 'a'"),
    "no sources": ([], ["p"], [], "expected a list of models"),
    "a settled field": ([{**FINE, "extra_body": {"n": 2}}], ["p"], [], "extra_body: 'n' is settled elsewhere"),
    "a misspelt flag": ([FINE], ["p"], ["--sampels", "2"], "no flag --sampels; did you mean --samples?"),
    "no answers": ([FINE], ["p"], ["--samples", "0"], "--samples: expected a whole number of at least 1, got '0'"),
    "a wrong shard": ([FINE], ["p"], ["--shard", "3/3"], "shard: expected i/n with i from 0 to n - 1"),
    "a model that is none": ([FINE], ["p"], ["--model", "b"], "--model: no 'b' in"),
    "a field that is none": (
        [FINE],
        ["p"],
        ["--keep", "skill"],
        "row 1, field 'skill': expected the field that --keep",
    ),
    "a settled field to keep": ([FINE], ["p"], ["--keep", "seed"], "--keep: seed is a field of the answers"),
    "no prompts": ([FINE], [], [], "expected at least one prompt"),
    "an empty prompt": ([FINE], ["p", {"prompt": " "}], [], "prompts.jsonl, row 2, field 'prompt': expected text"),
    "no prompt": ([FINE], [{"text": "p"}], [], "row 1, field 'prompt': expected a string"),
    "an answered prompt": ([FINE], [{"prompt": [{"role": "assistant", "content": "p"}]}], [], "end the prompt with"),
    "two prompts of one id": ([FINE], ["p", {"prompt_id": "p", "prompt": "q"}], [], "expected one prompt an id"),
    "another ending": ([FINE], ["p"], ["-o", "out.json"], "expected a file name ending in .jsonl"),
}


@pytest.mark.parametrize(("sources", "prompts", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_asked(sources, prompts, flags, words, sample, capsys, tmp_path):
    assert sample(sources, prompts, *flags) == 2
    shown = capsys.readouterr().err
    assert words.lower() in shown.lower()
    assert shown.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_only_models_that_are_asked_need_their_key(sample, monkeypatch):
    monkeypatch.delenv("NOT_SET_KEY", raising=False)
    with serving() as server:
        sources = [
            {"model": "a", "base_url": server.url, "samples": 1},
            {**FINE, "model": "b", "api_key_env": "NOT_SET_KEY"},
        ]
        assert sample(sources, ["p"], "--model", "a") == 0
    assert sample(sources, ["p"], "--model", "b") == 2


def test_a_missing_package_is_named_before_anything_is_asked(sample, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert sample([FINE], ["p"]) == 2
    assert "entry 1: needs the package openai: pip install 'wrpo[sample]'" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["[" * 3000, "- " + "9" * 5000, "- 2024-13-01", "- !!bool perhaps", "- model: [a"])
def test_a_sources_file_that_cannot_be_read_is_one_line(text, sample, tmp_path, capsys):
    sample([FINE], ["p"], "--samples", "0")  # writes the files
    (tmp_path / "sources.yaml").write_text(text)
    capsys.readouterr()
    arguments = [str(tmp_path / name) for name in ("sources.yaml", "prompts.jsonl")]
    assert cli.main(["sample", *arguments, "-o", str(tmp_path / "out.jsonl")]) == 2
    shown = capsys.readouterr().err
    assert "sources.yaml: " in shown
    assert shown.count("\n") == 1


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
