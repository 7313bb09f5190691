"""`wrpo score`: the right reward for each answer, each once, by a reward model, a judge or a function."""

from __future__ import annotations

import json
import os

import pytest
import torch
from scripted_server import completion, said, serving
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from wrpo import cli

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Its own folder, where verifiers are found, and nothing between us and loopback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


def row(prompt_id: str, response: str, *, model: str = "m", sample: int = 0, **more) -> dict:
    prompt = more.pop("prompt", f"prompt {prompt_id}")
    return {"prompt_id": prompt_id, "prompt": prompt, "model": model, "sample": sample, "response": response, **more}


@pytest.fixture
def score(tmp_path):
    def run(rows: list[dict], *flags: str, output: str = "scored.jsonl") -> int:
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (tmp_path / "answers.jsonl").write_text("\n".join(lines))
        return cli.main(["score", str(tmp_path / "answers.jsonl"), "-o", str(tmp_path / output), *flags])

    return run


@pytest.fixture
def rewards(tmp_path):
    """(prompt id, sample) -> reward, each there once."""

    def read(name: str = "scored.jsonl") -> dict[tuple[str, int], float]:
        rows = [json.loads(line) for line in (tmp_path / name).read_bytes().splitlines()]
        found = {(row["prompt_id"], row["sample"]): row["reward"] for row in rows}
        assert len(found) == len(rows), "an answer was scored twice"
        return found

    return read


# -- a function -------------------------------------------------------------------------------------------------------


@pytest.fixture
def verifier(tmp_path, request):
    """Writes a module with a function `reward`, under a name of its own; returns `module:reward`."""

    def write(code: str) -> str:
        name = f"verifier_{abs(hash((request.node.name, code)))}"
        (tmp_path / f"{name}.py").write_text(code)
        return f"{name}:reward"

    return write


LENGTH = "def reward(prompt, response): return len(response)"


def test_a_verifier_gives_each_row_its_reward_and_keeps_the_rest(score, verifier, tmp_path):
    assert score([row("a", "four", finish_reason="stop"), row("b", "")], "--verifier", verifier(LENGTH)) == 0
    first, second = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_bytes().splitlines()]
    name = first.pop("scorer")
    assert name.endswith(":reward")
    assert first == row("a", "four", finish_reason="stop", reward=4.0)
    assert second["reward"] == 0.0, "an empty answer is an answer"


def test_a_verifier_gets_the_text_or_the_conversation_and_the_row_if_it_wants_it(score, verifier, rewards):
    code = """
def reward(prompt, response, row, tolerance=0):
    assert isinstance(prompt, list) == (row["prompt_id"] == "talk"), prompt
    return float(response == row["answer"])
"""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        row("a", "5", answer="5"),
        row("b", "6", answer="5"),
        row("one", "5", answer="5", prompt=[{"role": "user", "content": "u"}]),
        row("talk", "5", answer="5", prompt=talk),
    ]
    assert score(rows, "--verifier", verifier(code)) == 0
    assert rewards() == {("a", 0): 1, ("b", 0): 0, ("one", 0): 1, ("talk", 0): 1}


FAULTS = {
    "float('nan')": "the reward is nan",
    "float('inf')": "the reward is inf",
    "-10**400 * 1.0": "raised OverflowError",
    "1 / 0": "raised ZeroDivisionError: division by zero",
    "None": "expected a number from",
    "'0.5'": "expected a number from",
    "exit()": "raised SystemExit",
}


@pytest.mark.parametrize(("value", "words"), FAULTS.items(), ids=FAULTS)
def test_a_verifier_that_fails_on_a_row_costs_that_row_and_names_it(value, words, score, verifier, rewards, capsys):
    code = f"def reward(prompt, response): return {value} if response == 'bad' else 1"
    name = verifier(code)
    assert score([row("a", "fine"), row("b", "bad"), row("c", "fine")], "--verifier", name) == 3
    assert rewards() == {("a", 0): 1, ("c", 0): 1}
    shown = capsys.readouterr().out
    assert words in shown
    assert "answers.jsonl, row 2" in shown


def test_true_and_numbers_of_other_libraries_are_numbers(score, verifier, rewards):
    code = "import numpy, torch\ndef reward(p, r): return {'t': True, 'n': numpy.float32(0.5), 'o': torch.tensor(2)}[r]"
    assert score([row("a", "t"), row("b", "n"), row("c", "o")], "--verifier", verifier(code)) == 0
    assert rewards() == {("a", 0): 1, ("b", 0): 0.5, ("c", 0): 2}


def test_a_verifier_that_always_fails_is_given_up(score, verifier, capsys):
    name = verifier("def reward(prompt, response): raise KeyError('answer')")
    assert score([row(f"{n}", "r") for n in range(150)], "--verifier", name) == 3
    assert "not asked 50" in capsys.readouterr().out


def test_a_continued_run_gets_past_the_answers_that_the_verifier_fails_on(score, verifier, rewards):
    name = verifier("def reward(prompt, response): return {'good': 1.0}[response]")
    bad = [row(f"{n}", "bad") for n in range(150)]
    assert score([row("first", "good"), *bad], "--verifier", name) == 3
    assert score([*bad, row("last", "good")], "--verifier", name) == 3
    assert rewards() == {("first", 0): 1, ("last", 0): 1}


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_second_run_scores_what_is_missing_and_what_was_drawn_again(score, verifier, rewards, tmp_path):
    name = verifier(
        "def reward(prompt, response):\n    open('calls', 'a').write(response + '\\n')\n    return len(response)"
    )
    rows = [row("a", "1", sample=0), row("a", "22", sample=1), row("b", "333")]
    assert score(rows[:2], "--verifier", name) == 0
    assert score(rows, "--verifier", name) == 0
    assert rewards() == {("a", 0): 1, ("a", 1): 2, ("b", 0): 3}
    lines = (tmp_path / "scored.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scored.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed while writing
    assert score(rows, "--verifier", name) == 0
    assert rewards() == {("a", 0): 1, ("a", 1): 2, ("b", 0): 3}
    assert (tmp_path / "calls").read_text().split() == ["1", "22", "333", "333"]
    assert score([row("a", "drawn again", sample=0)], "--verifier", name) == 0
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "drawn again"


def test_a_file_of_answers_named_twice_is_scored_once(verifier, rewards, tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps(row("a", "r")))
    flags = ["-o", "scored.jsonl", "--verifier", verifier(LENGTH)]
    assert cli.main(["score", "answers.jsonl", str(tmp_path / "answers.jsonl"), "a*s.jsonl", *flags]) == 0
    assert rewards() == {("a", 0): 1}


def test_shards_score_every_answer_of_their_prompts(score, verifier, rewards):
    rows = [row(f"p{n}", "r", sample=s) for n in range(30) for s in range(2)]
    for shard in "01":
        assert score(rows, "--verifier", verifier(LENGTH), "--shard", f"{shard}/2", output=f"{shard}.jsonl") == 0
    first, second = rewards("0.jsonl"), rewards("1.jsonl")
    assert len(first) + len(second) == 60
    assert not {prompt for prompt, _ in first} & {prompt for prompt, _ in second}
    assert 16 <= len(first) <= 44


# -- mistakes ---------------------------------------------------------------------------------------------------------

FINE = [row("a", "r")]
MISTAKES = {
    "no scorer": (FINE, [], "reward_model, judge, verifier: expected one of them, got none"),
    "an empty verifier": (FINE, ["--verifier", ""], "verifier: expected a name, got ''"),
    "an empty judge": (FINE, ["--judge", ""], "judge: expected a name, got ''"),
    "half a surrogate pair": ([row("\ud800", "r")], ["--verifier", "a:b", "--shard", "0/2"], "expected UTF-8 text"),
    "a negative sample": ([row("a", "r", sample=-1)], ["--verifier", "a:b"], "expected a whole number from 0"),
    "an answered prompt": (
        [row("a", "r", prompt=[{"role": "assistant", "content": "p"}])],
        ["--verifier", "a:b"],
        "End the prompt with the user's turn",
    ),
    "two scorers": (FINE, ["--verifier", "a:b", "--judge", "c"], "got judge and verifier"),
    "a misspelt flag": (FINE, ["--verifer", "a:b"], "no setting named 'verifer'; did you mean 'verifier'?"),
    "no colon": (FINE, ["--verifier", "my_rewards.exact"], "expected module:function"),
    "no module": (FINE, ["--verifier", "no_such_module:f"], "No module named 'no_such_module'"),
    "no function": (FINE, ["--verifier", "json:f"], "json has no 'f'"),
    "not a function": (FINE, ["--verifier", "json:__doc__"], "expected a function, got str"),
    "a function of something else": (FINE, ["--verifier", "json:dumps"], "expected a function of (prompt, response)"),
    "no model": (FINE, ["--reward-model", "nowhere"], "reward_model 'nowhere': "),
    "no judge": (FINE, ["--judge", "nowhere.yaml"], "nowhere.yaml: No such file"),
    "no response": ([{"prompt_id": "a", "prompt": "p", "model": "m"}], ["--verifier", "a:b"], "field 'response'"),
    "no answers": ([], ["--verifier", "a:b"], "expected at least one answer"),
    "broken": (["{"], ["--verifier", "a:b"], "row 1: expected valid JSON"),
    "written into itself": (FINE, ["--verifier", "a:b", "-o", "answers.jsonl"], "is read and written at once"),
}


@pytest.mark.parametrize(("rows", "flags", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_scored(rows, flags, words, score, capsys, tmp_path):
    assert score(rows, *flags) == 2
    shown = capsys.readouterr().err
    assert words.lower() in shown.lower()
    assert shown.count("\n") == 1
    assert not (tmp_path / "scored.jsonl").exists()


def test_one_file_holds_one_scorers_rewards(score, verifier, capsys):
    assert score(FINE, "--verifier", verifier(LENGTH)) == 0
    assert score(FINE, "--verifier", verifier(LENGTH + "\n")) == 2
    assert "One file holds one scorer's rewards" in capsys.readouterr().err


def test_a_verifier_that_cannot_be_imported_says_why(score, verifier, capsys):
    assert score(FINE, "--verifier", verifier("import no_such_thing")) == 2
    assert "No module named 'no_such_thing'" in capsys.readouterr().err


def test_bad_rows_are_left_out_where_asked(score, verifier, rewards, capsys):
    rows = [row("a", "r"), {"prompt_id": "b"}, "{", row("c", "r")]
    assert score(rows, "--verifier", verifier(LENGTH), "--skip-bad-rows") == 0
    assert rewards() == {("a", 0): 1, ("c", 0): 1}
    assert "2 answers; 2 bad rows skipped" in capsys.readouterr().out


# -- a judge ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(tmp_path):
    def write(**fields) -> list[str]:
        settings = {"model": "j", "retry_wait": 0.01, "retries": 2, **fields}
        (tmp_path / "judge.yaml").write_text(json.dumps(settings))
        return ["--judge", str(tmp_path / "judge.yaml")]

    return write


READINGS = {
    "Good. Score: 7": 7,
    "score 3 at first, but then\n**Score:** 8/10": 8,
    "Score: [[5.5]]": 5.5,
    " 9 ": 9,
    "SCORE = 1": 1,
    "<think>Score: 1 is useless, so more than that.</think>Score (1-10): 8": 8,
}


def test_the_judges_score_is_the_reward(score, judge, rewards):
    with serving(lambda body, attempt: completion(said(body).split("|")[1])) as server:
        flags = judge(base_url=server.url, template="|{response}|")
        assert score([row(f"{n}", text) for n, text in enumerate(READINGS)], *flags) == 0
    assert rewards() == {(f"{n}", 0): value for n, value in enumerate(READINGS.values())}


def test_the_judge_is_shown_prompt_and_answer_and_nothing_is_filled_in_twice(score, judge):
    with serving(lambda body, attempt: completion("5")) as server:
        flags = judge(base_url=server.url, template="{prompt}/{response}/{lowest}-{highest}/{other}")
        assert score([row("a", "{prompt}", prompt="{response} {x}")], *flags) == 0
    (body,) = server.bodies
    assert said(body) == "{response} {x}/{prompt}/1-10/{other}"
    assert body["temperature"] == 0


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{question} {response} {Answer}",
            "template holds {question}, which is sent as it is: filled in are {prompt},",
        ),
        ('{prompt} {response} {"score": N} \\boxed{n} {} { x }', None),
    ],
)
def test_a_place_that_nothing_is_filled_into_is_said(template, named, score, judge, capsys):
    with serving(lambda body, attempt: completion("5")) as server:
        assert score([row("a", "x")], *judge(base_url=server.url, template=template)) == 0
    log = capsys.readouterr().err
    assert named in log if named else "which is sent as it is" not in log


UNREADABLE = ["I would rather not.", "Score: eleven", "Score: 11", "Score: -1", "10 reasons", "Score: 4/5", "7 or 8"]


def test_a_reply_without_a_score_is_asked_for_again_and_then_costs_its_row(score, judge, rewards, capsys):
    def script(body, attempt):
        answer = said(body).split("|")[1]
        return completion(answer if answer == UNREADABLE[0] or body["temperature"] == 0 else "Score: 4")

    with serving(script) as server:
        flags = judge(base_url=server.url, template="|{response}|")
        assert score([row(f"{n}", text) for n, text in enumerate(UNREADABLE)], *flags) == 3
        assert len(server.bodies) == 3 + 2 * 6
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
    assert rewards() == {(f"{n}", 0): 4 for n in range(1, 7)}
    shown = capsys.readouterr().out
    assert ": the judge's reply holds no score (3 tries); first: " in shown
    assert "row 1" in shown


@pytest.mark.parametrize("finish_reason", ["length", "MAX_TOKENS", "content_filter"])
def test_a_judge_who_was_cut_has_not_judged(finish_reason, score, judge, rewards, capsys):
    cut = completion("Score: 1 is useless.\nScore: 1", finish_reason)
    with serving(lambda body, attempt: completion("Score: 8") if body["temperature"] else cut) as server:
        assert score(FINE, *judge(base_url=server.url)) == 0
    assert rewards() == {("a", 0): 8}
    with serving(lambda body, attempt: cut) as server:
        assert score(FINE, *judge(base_url=server.url), output="other.jsonl") == 3
    assert f"the judge's reply was cut (finish_reason {finish_reason!r}): if it is too long" in capsys.readouterr().out


def test_the_judges_pattern_and_scale_may_be_ones_own(score, judge, rewards):
    with serving(lambda body, attempt: completion("style 3, rating 0.25")) as server:
        flags = judge(base_url=server.url, pattern="rating ([0-9.]+)", lowest=0, highest=1)
        assert score(FINE, *flags) == 0
    assert rewards() == {("a", 0): 0.25}


@pytest.mark.parametrize(
    "changed", [{"template": "{response}?"}, {"pattern": "(.)"}, {"lowest": 0}, {"highest": 9}, {"temperature": 1}]
)
def test_a_judge_of_other_settings_does_not_continue_the_file(changed, score, judge, capsys):
    with serving(lambda body, attempt: completion("5")) as server:
        assert score(FINE, *judge(base_url=server.url)) == 0
        assert score(FINE, *judge(base_url=server.url, concurrency=2)) == 0
        assert score(FINE, *judge(base_url=server.url, **changed)) == 2
        assert len(server.bodies) == 1
    assert "One file holds one scorer's rewards, with one template" in capsys.readouterr().err


def test_a_judges_key_appears_nowhere(score, judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda body, attempt: (401, {"error": {"message": f"bad key {KEY}"}})) as server:
        assert score(FINE, *judge(base_url=server.url, api_key_env="JUDGE_KEY")) == 3
    assert server.keys == [KEY]
    shown = capsys.readouterr()
    assert "401" in shown.out
    assert KEY not in shown.out + shown.err + "".join(path.read_text() for path in tmp_path.glob("*.*"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"templat": "x"}, "no setting named 'templat'; did you mean 'template'?"),
        ({"template": "{prompt}"}, "template: expected {response} in it"),
        ({"pattern": "("}, "pattern: not a regular expression"),
        ({"pattern": "x"}, "pattern: expected one group, the number, got 0"),
        ({"lowest": 5, "highest": 5}, "highest: expected more than lowest, 5, got 5"),
        ({"kind": "vllm"}, "kind: a judge is a server"),
        ({"api_key": KEY}, "Keys come from the environment"),
    ],
)
def test_a_mistake_in_the_judges_file_is_named(fields, words, score, judge, capsys):
    assert score(FINE, *judge(**{"base_url": "http://127.0.0.1:1/v1", **fields})) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert KEY not in shown


# -- a reward model ---------------------------------------------------------------------------------------------------


def save_model(folder, *, labels: int = 1, pad: bool = True, code: str | None = None):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None,
        initializer_range=0.5,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if code is not None:
        (folder / "custom.py").write_text(code)
        saved = json.loads((folder / "config.json").read_text())
        saved["auto_map"] = {"AutoModelForSequenceClassification": "custom.Custom"}
        (folder / "config.json").write_text(json.dumps(saved))
    return model, tokenizer


def alone(model, tokenizer, rows: list[dict], label: int = 0) -> dict[tuple[str, int], float]:
    """Each answer's logit by itself, without padding: the truth."""
    found = {}
    for answer in rows:
        messages = [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["response"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            found[answer["prompt_id"], answer["sample"]] = model(input_ids=ids).logits[0, label].item()
    return found


ANSWERS = [row(f"p{n}", "two and three is five " * (n % 4) + "!" * n, sample=n % 2) for n in range(11)]
# Padding changes the order of sums in float32: two layers of width 32 with scores of a few units.
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_a_reward_is_the_models_logit_for_the_whole_conversation(batch_size, score, rewards, tmp_path):
    model, tokenizer = save_model(tmp_path / "rm")
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm"), "--batch-size", batch_size) == 0
    truth = alone(model, tokenizer, ANSWERS)
    assert max(truth.values()) - min(truth.values()) > 0.1, "rewards that do not differ prove nothing"
    assert rewards() == {key: pytest.approx(value, **CLOSE) for key, value in truth.items()}


def test_a_model_without_a_padding_token_scores_one_at_a_time(score, rewards, tmp_path, monkeypatch):
    model, tokenizer = save_model(tmp_path / "rm", pad=False)
    truth = alone(model, tokenizer, ANSWERS)
    forward, sizes = LlamaForSequenceClassification.forward, []

    def counted(self, input_ids, **more):
        sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", counted)
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm")) == 0
    assert rewards() == {key: pytest.approx(value, **CLOSE) for key, value in truth.items()}
    assert sizes == [1] * len(ANSWERS)


def test_several_labels_need_a_choice(score, rewards, tmp_path, capsys):
    model, tokenizer = save_model(tmp_path / "rm", labels=3)
    flags = ["--reward-model", str(tmp_path / "rm")]
    assert score(ANSWERS, *flags) == 2
    assert "gives 3 numbers an answer; choose one with label, 0 to 2" in capsys.readouterr().err
    assert score(ANSWERS, *flags, "--label", "3") == 2
    assert score(ANSWERS, *flags, "--label", "2") == 0
    assert score(ANSWERS, *flags, "--label", "1") == 2, "another label's rewards are not these"
    (tmp_path / "template.jinja").write_text("{{ messages[-1].content }}")
    template = ["--chat-template-file", str(tmp_path / "template.jinja")]
    assert score(ANSWERS, *flags, "--label", "2", *template) == 2, "nor are those of another chat template"
    truth = alone(model, tokenizer, ANSWERS, label=2)
    assert rewards() == {key: pytest.approx(value, **CLOSE) for key, value in truth.items()}


def test_a_conversation_that_is_too_long_is_refused_not_cut(score, rewards, tmp_path, capsys):
    save_model(tmp_path / "rm")
    rows = [row("a", "fine"), row("b", "word " * 200), row("c", "fine too")]
    assert score(rows, "--reward-model", str(tmp_path / "rm")) == 3
    assert rewards().keys() == {("a", 0), ("c", 0)}
    shown = capsys.readouterr().out
    assert "the conversation has more than 128 tokens" in shown
    assert "row 2" in shown


def test_any_number_of_conversations_that_are_too_long_do_not_end_the_scoring(score, rewards, tmp_path):
    save_model(tmp_path / "rm")
    rows = [*(row(f"{n}", "word " * 200) for n in range(120)), *(row(f"fine {n}", "fine") for n in range(20))]
    assert score(rows, "--reward-model", str(tmp_path / "rm")) == 3
    assert len(rewards()) == 20


def test_padding_that_is_no_token_of_the_model_changes_no_reward(score, rewards, tmp_path):
    """Some configs have -1; in a batch the reward would be read off the padding."""
    model, tokenizer = save_model(tmp_path / "rm", pad=False)
    path = tmp_path / "rm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1}))
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm"), "--batch-size", "4") == 0
    expected = alone(model, tokenizer, ANSWERS)
    assert rewards() == {key: pytest.approx(value, **CLOSE) for key, value in expected.items()}


def test_a_token_that_the_model_has_no_row_for_costs_its_answer_and_is_named(score, rewards, tmp_path, capsys):
    _, tokenizer = save_model(tmp_path / "rm")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "rm")
    assert score([row("a", "fine"), row("b", "a <new> word")], "--reward-model", str(tmp_path / "rm")) == 3
    assert rewards().keys() == {("a", 0)}
    assert f"the token '<new>' has the id {len(tokenizer) - 1}, and the model has rows for" in capsys.readouterr().out


def test_a_lora_on_a_reward_model_gives_its_own_rewards(score, rewards, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, tokenizer = save_model(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm")) == 0
    expected = alone(model, tokenizer, ANSWERS)
    assert rewards() == {key: pytest.approx(value, **CLOSE) for key, value in expected.items()}


def test_a_model_whose_reward_head_was_never_trained_is_refused(score, tmp_path, capsys):
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    assert score(ANSWERS, "--reward-model", str(tmp_path / "lm")) == 2
    assert "no trained weights for score.weight (1 of 12 parameters): they would be random" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused(score, tmp_path, capsys):
    save_model(tmp_path / "rm")
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "chat_template.jinja").unlink(missing_ok=True)
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm")) == 2
    assert "a chat template, got one without. Take the chat version of the model, or name" in capsys.readouterr().err


CUSTOM = """
from transformers import LlamaForSequenceClassification
from transformers.utils import ModelOutput
from dataclasses import dataclass
import pathlib, torch

pathlib.Path(r"{mark}").touch()

@dataclass
class Output(ModelOutput):
    logits: torch.Tensor = None
    score: torch.Tensor = None

class Custom(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return Output(logits=out.logits, score=2 * out.logits[:, 1])
"""


def test_code_of_a_model_runs_only_when_asked_and_its_score_is_the_reward(score, rewards, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, tokenizer = save_model(tmp_path / "rm", labels=3, code=CUSTOM.replace("{mark}", str(tmp_path / "ran")))
    flags = ["--reward-model", str(tmp_path / "rm")]
    score(ANSWERS, *flags)
    assert not (tmp_path / "ran").exists()
    assert score(ANSWERS, *flags, "--trust-remote-code") == 0
    assert (tmp_path / "ran").exists()
    truth = alone(model, tokenizer, ANSWERS, label=1)
    assert rewards() == {key: pytest.approx(2 * value, **CLOSE) for key, value in truth.items()}


def test_a_batch_that_does_not_fit_is_halved(score, rewards, tmp_path, monkeypatch):
    model, tokenizer = save_model(tmp_path / "rm")
    forward = LlamaForSequenceClassification.forward

    def small(self, input_ids, **more):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", small)
    assert score(ANSWERS, "--reward-model", str(tmp_path / "rm"), "--batch-size", "8") == 0
    monkeypatch.undo()
    assert rewards() == {key: pytest.approx(v, **CLOSE) for key, v in alone(model, tokenizer, ANSWERS).items()}
