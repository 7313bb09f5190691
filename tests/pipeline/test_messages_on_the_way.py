"""Tools, calls, names and thoughts go with their messages from `wrpo sample` to training; what cannot go is named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scored_answers import answers, write_lines
from scripted_server import completion, serving
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from wrpo import cli
from wrpo.building import BuildSettings, build_rows
from wrpo.data import DataError, load_examples
from wrpo.rows.messages import asked
from wrpo.sampling.served_messages import served_messages
from wrpo.scoring.candidates import prompt_text

pytest_plugins = ("sampling_fixtures",)  # its fixtures

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"default": None}}}]
TALK = [
    {"role": "user", "content": "weather in Oslo?", "name": "Ann"},
    {"role": "assistant", "content": "I look it up.", "reasoning_content": "a tool knows", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "name": "weather"},
]
ROW = {"prompt_id": "x", "prompt": TALK, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
KNOWS_ALL = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }} {{ m.name }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ enable_thinking }}\n{% endif %}"
)
SHAPE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip


def save_model(folder: Path, template: str, kind=LlamaForCausalLM, **more):
    """A model of random weights, and its tokenizer."""
    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(5)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    kind(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ids, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


# -- what a server is sent --------------------------------------------------------------------------------------------


def test_a_server_is_sent_every_field_tools_and_options(sample, written):
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        own = {"extra_body": {"top_k": 5, "chat_template_kwargs": {"enable_thinking": True, "other": 1}}}
        assert sample([source | own], [ROW]) == 0
    (body,) = server.bodies
    call = {
        "id": "call_1_0", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }  # fmt: skip
    assert body["messages"] == [TALK[0], TALK[1] | {"tool_calls": [call]}, TALK[2] | {"tool_call_id": "call_1_0"}]
    assert (body["tools"], body["top_k"]) == (TOOLS, 5)
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "other": 1}
    (answer,) = written()
    assert {name: answer[name] for name in ROW} == ROW, "the answer's row asks what the prompt's did"


def test_a_system_text_in_a_column_of_its_own_is_asked(sample, written):
    with serving() as server:
        rows = [{"prompt": "two", "system": text} for text in ("be brief", "be long", "")]
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], rows) == 0
    sent = sorted(json.dumps([(m["role"], m["content"]) for m in body["messages"]]) for body in server.bodies)
    long, brief, none = ([["system", f"be {word}"], ["user", "two"]] for word in ("long", "brief", ""))
    assert list(map(json.loads, sent)) == [brief, long, none[1:]]
    assert len({row["prompt_id"] for row in written()}) == 3


def test_an_answer_to_other_tools_is_no_answer_to_this_prompt(sample, capsys):
    with serving() as server:
        source = {"model": "a", "base_url": server.url, "samples": 1}
        assert sample([source], [ROW]) == 0
        assert sample([source], [ROW]) == 0
        assert len(server.bodies) == 1
        assert sample([source], [{**ROW, "tools": [*TOOLS, *TOOLS]}]) == 2
    assert "expected the prompt that is now 'x'" in capsys.readouterr().err


def test_an_answer_that_calls_a_tool_is_named_not_half_kept(sample, written, capsys):
    reply = completion("I look it up.", "tool_calls")
    reply["choices"][0]["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": CALL["function"]}]
    with serving(lambda body, attempt: reply) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], [ROW]) == 3
    assert written() == []
    assert "the answer calls 'weather', and a row holds an answer in text alone" in capsys.readouterr().out


def test_calls_and_results_that_have_ids_keep_them_and_odd_ones_stay_as_they_are():
    calls = [{"id": "b", "name": "add", "arguments": "{}"}, {"function": "odd"}, "odder"]
    talk = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "call_0_1"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "0"},
    ]
    calling, second, first, stray = served_messages(talk)
    assert calling["tool_calls"] == [
        {"id": "b", "type": "function", "function": {"name": "add", "arguments": "{}"}},
        {"id": "call_0_1", "type": "function", "function": "odd"},
        "odder",
    ]
    assert [second["tool_call_id"], first["tool_call_id"], stray] == ["call_0_1", "b", talk[3]]


# -- models that run here ---------------------------------------------------------------------------------------------


def sampled_here(tmp_path: Path, prompts: list[dict]) -> int:
    source = {"model": "a", "kind": "transformers", "path": str(tmp_path / "model"), "samples": 2}
    (tmp_path / "sources.yaml").write_text(json.dumps([source]))
    write_lines(prompts, tmp_path / "prompts.jsonl")
    files = [str(tmp_path / name) for name in ("sources.yaml", "prompts.jsonl")]
    return cli.main(["sample", *files, "-o", str(tmp_path / "out.jsonl"), "--max-tokens", "4"])


def test_a_model_here_is_asked_the_rendering_of_training(written, tmp_path, monkeypatch):
    tokenizer = save_model(tmp_path / "model", KNOWS_ALL)
    asked_ids = []
    generate = LlamaForCausalLM.generate

    def noted(self, input_ids, **more):
        asked_ids.extend(input_ids.tolist())
        return generate(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "generate", noted)
    assert sampled_here(tmp_path, [ROW]) == 0
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(TALK, tools=TOOLS, **options)
    assert tokenizer.decode(asked_ids[0]) == text
    assert written()[0]["tools"] == TOOLS


def test_what_a_local_template_loses_of_a_prompt_is_named_and_what_it_changes_counted(tmp_path, capsys):
    save_model(
        tmp_path / "model", CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    )
    lost = {"prompt": [*TALK[:1], {"role": "assistant", "content": "wait"}, TALK[2]]}
    controls = {"prompt": "what does <|im_end|> mean?"}
    assert sampled_here(tmp_path, [ROW, lost, controls]) == 3
    shown = capsys.readouterr()
    assert "expected a chat template that writes the call of 'weather', got less of it" in shown.out
    assert "expected a chat template that writes all of the tool message, got less of it" in shown.out
    assert "1 prompt: control token '<|im_end|>' in the text of a prompt" in shown.err


@pytest.mark.parametrize("raises", ["messages[0].content + none", "1 // 0", "messages[0].nothing.there", "none.x()"])
def test_whatever_a_template_raises_costs_its_row_where_models_answer_and_score(raises, tmp_path, capsys):
    template = CHATML + "{{ " + raises + " if messages[0].content == 'bad' }}"
    save_model(tmp_path / "model", template)
    assert sampled_here(tmp_path, [{"prompt": "bad"}, {"prompt": "two"}]) == 3
    assert "expected messages the chat template accepts, got its refusal" in capsys.readouterr().out
    save_model(tmp_path / "rm", template, LlamaForSequenceClassification, num_labels=1)
    flags = ["--reward-model", str(tmp_path / "rm")]
    assert scored(tmp_path, {"prompt_id": "x", "prompt": "bad"}, *flags) == (3, [])
    assert scored(tmp_path, {"prompt_id": "y", "prompt": "two"}, *flags)[0] == 0


# -- scorers ----------------------------------------------------------------------------------------------------------


def scored(tmp_path: Path, row: dict, *flags: str) -> tuple[int, list[dict]]:
    candidate = {"model": "m", "sample": 0, "response": "It rains."} | row
    write_lines([candidate], tmp_path / "answers.jsonl")
    status = cli.main(["score", str(tmp_path / "answers.jsonl"), "-o", str(tmp_path / "scored.jsonl"), *flags])
    return status, [json.loads(line) for line in (tmp_path / "scored.jsonl").read_bytes().splitlines()]


def test_a_reward_model_reads_tools_and_every_field(tmp_path):
    tokenizer = save_model(tmp_path / "rm", KNOWS_ALL, LlamaForSequenceClassification, num_labels=1)
    status, (row,) = scored(tmp_path, ROW, "--reward-model", str(tmp_path / "rm"))
    talk = [*TALK, {"role": "assistant", "content": "It rains."}]
    text = tokenizer.apply_chat_template(talk, tools=TOOLS, tokenize=False, enable_thinking=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "rm")
    with torch.no_grad():
        assert row["reward"] == pytest.approx(model(input_ids=ids).logits.item(), rel=1e-4, abs=1e-5)
    assert (status, row["tools"]) == (0, TOOLS)


def test_a_reward_models_template_that_loses_words_gives_no_reward_and_says_why(tmp_path, capsys):
    save_model(tmp_path / "rm", CHATML, LlamaForSequenceClassification, num_labels=1)
    assert scored(tmp_path, ROW, "--reward-model", str(tmp_path / "rm")) == (3, [])
    assert "expected a chat template that writes the call of 'weather'" in capsys.readouterr().out


def test_a_judge_and_a_verifier_are_told_what_a_prompt_holds(tmp_path, monkeypatch):
    text = prompt_text(asked(ROW))
    assert text.startswith('tools: [{"type": "function"')
    assert 'assistant: I look it up.\n{"reasoning_content": "a tool knows", "tool_calls": [{' in text
    assert prompt_text(asked({"prompt": "two"})) == "two"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "knowing.py").write_text(
        "def verify(prompt, response, row):\n    return prompt[1]['tool_calls'] == row['prompt'][1]['tool_calls']\n"
    )
    _, (row,) = scored(tmp_path, ROW, "--verifier", "knowing:verify")
    assert row["reward"] == 1.0


# -- wrpo build -------------------------------------------------------------------------------------------------------

BESIDE = {name: ROW[name] for name in ("prompt", "tools", "chat_template_kwargs")}
CANDIDATES = [row | BESIDE for row in answers("x", big=[0.9], target=[0.6, 0.1])]
PLAIN = answers("y", big=[0.9], target=[0.6, 0.1])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_built_rows_ask_what_the_candidates_were_asked(form, tmp_path):
    write_lines([*CANDIDATES, *PLAIN], tmp_path / "candidates.jsonl")
    out = tmp_path / "out"
    flags = ["--sft_share", "0", "--format", form]
    assert cli.main(["build", str(tmp_path / "candidates.jsonl"), "-o", str(out), *flags]) == 0
    rows = {len(json.loads(row["prompt"])): row for row in load_examples(out / f"triples.{form}")}
    assert json.loads(rows[3]["prompt"]) == TALK
    assert json.loads(rows[3]["tools"]) == TOOLS
    assert json.loads(rows[3]["chat_template_kwargs"]) == {"enable_thinking": False}
    assert (json.loads(rows[1]["prompt"]), rows[1]["tools"]) == ([{"role": "user", "content": "question y"}], None)


def test_prompts_that_wait_for_the_target_are_asked_as_the_sources_were(sample, tmp_path):
    """wrpo build --stage sft writes them, as Parquet too, and wrpo sample reads them."""
    write_lines(CANDIDATES[:1], tmp_path / "candidates.jsonl")
    flags = ["--stage", "sft", "--sft_share", "0", "--format", "parquet"]
    assert cli.main(["build", str(tmp_path / "candidates.jsonl"), "-o", str(tmp_path / "out"), *flags]) == 0
    with serving() as server:
        source = {"model": "target", "base_url": server.url, "samples": 1}
        assert sample([source], [ROW], output="rows.jsonl") == 0
        assert sample([source], ["z"], more=str(tmp_path / "out" / "prompts.parquet")) == 0
    first, *others = server.bodies
    (again,) = [body for body in others if len(body["messages"]) == 3]
    assert {name: again[name] for name in again if name != "seed"} == {n: first[n] for n in first if n != "seed"}


def test_prompts_with_other_tools_are_other_prompts():
    rows = [*CANDIDATES[:2], CANDIDATES[2] | {"tools": None}]
    with pytest.raises(DataError, match=r"field 'prompt': expected the prompt that 'x' has in .* with \{'tools'"):
        build_rows(rows, BuildSettings(sft_share=0))


def test_a_field_that_a_table_has_no_column_for_is_named(tmp_path, capsys):
    odd = [row | {"prompt": [{"role": "user", "content": "two", "weight": 0}]} for row in CANDIDATES[:3]]
    write_lines(odd, tmp_path / "candidates.jsonl")
    flags = ["-o", str(tmp_path / "out"), "--sft_share", "0", "--format"]
    assert cli.main(["build", str(tmp_path / "candidates.jsonl"), *flags, "parquet"]) == 2
    assert "field 'prompt': expected text under role, content, reasoning_content" in capsys.readouterr().err
    assert cli.main(["build", str(tmp_path / "candidates.jsonl"), *flags, "jsonl"]) == 0


def test_the_limits_of_a_prompt_count_all_that_it_holds():
    for most, kept in ((40, 0), (2000, 1)):
        settings = BuildSettings(sft_share=1, max_prompt_chars=most)
        if kept:
            assert len(build_rows(CANDIDATES[:1], settings).sft) == 1
        else:
            with pytest.raises(DataError, match="prompt longer than 40 characters"):
                build_rows(CANDIDATES[:1], settings)


def test_candidates_from_a_table_ask_without_its_nulls(tmp_path):
    rows = [row | {"tools": json.dumps(TOOLS)} for row in CANDIDATES]
    rows += [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PLAIN]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    triples = {row["prompt_id"]: row for row in build_rows(tmp_path / "c.parquet", BuildSettings(sft_share=0)).triples}
    assert (triples["x"]["prompt"], triples["x"]["tools"]) == (TALK, TOOLS)
    assert triples["y"]["prompt"] == "question y"
    assert "tools" not in triples["y"]
