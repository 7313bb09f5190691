"""Messages, tools and options reach the chat template as they are; what it leaves out is no secret."""

from __future__ import annotations

import pytest
from tiny_tokenizer import CHATML, HEADERS, OPENS_A_THOUGHT, REFUSES_SYSTEM, tiny_tokenizer

from wrpo.data.rendering import Renderer
from wrpo.rows.errors import DataError

USER = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"default": None}}}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}],
}
# As Qwen 3: tools in a system turn, thoughts and calls in the assistant's.
KNOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}({{ call.function.arguments }})</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening or '' }}{% endif %}"
)


def test_a_response_is_what_the_conversation_adds_to_the_prompt():
    start, whole, _ = Renderer(tiny_tokenizer())([SYSTEM, USER], {"a": ANSWER, "b": ANSWER | {"content": "\n6 "}})
    turns = ["system\nbe brief<|im_end|>\n", "user\n2 + 3?<|im_end|>\n", "assistant\n"]
    assert start == "".join("<|im_start|>" + turn for turn in turns)
    assert whole == {"a": start + "5<|im_end|>", "b": start + "\n6 <|im_end|>"}


def test_tools_calls_and_thoughts_are_written_by_the_template():
    prompt = [USER, CALL, {"role": "tool", "content": "5", "tool_call_id": "1"}]
    answer = ANSWER | {"reasoning_content": "The tool said it."}
    start, whole, _ = Renderer(tiny_tokenizer(KNOWS_TOOLS))(prompt, {"a": answer}, tools=TOOLS)
    assert '"default": null' in start
    assert '<call>add({"a": 2, "b": 3})</call>' in start
    assert whole["a"] == start + "<think>The tool said it.</think>5<|im_end|>"


def test_a_call_of_a_tool_is_rendered_as_an_answer():
    start, whole, _ = Renderer(tiny_tokenizer(KNOWS_TOOLS))([USER], {"a": CALL})
    assert whole["a"] == start + '<call>add({"a": 2, "b": 3})</call><|im_end|>'


@pytest.mark.parametrize("call", [CALL, CALL | {"tool_calls": [{"name": "add", "arguments": {}}]}])
def test_a_template_that_leaves_out_tools_or_calls_is_refused(call):
    renderer = Renderer(tiny_tokenizer(CHATML))
    with pytest.raises(DataError, match="field 'tools': expected a chat template that writes the tool 'add'"):
        renderer([USER], {"a": ANSWER}, tools=TOOLS)
    with pytest.raises(DataError, match="field 'a': expected a chat template that writes the call of 'add'"):
        renderer([USER], {"a": call})


def test_a_rows_options_win_over_those_of_the_run():
    template = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ one }}{{ two }}")
    renderer = Renderer(tiny_tokenizer(template), {"one": 1, "two": 2})
    assert "user12\n" in renderer([USER], {}).prompt
    assert "user13\n" in renderer([USER], {}, chat_template_kwargs={"two": 3}).prompt
    assert "user12\n" in renderer([USER], {}).prompt


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (REFUSES_SYSTEM, "its refusal: no system turns"),
        ("{{ messages[0].content + none }}", "its refusal: can only concatenate"),
        ("{{ messages[0].nothing.there }}", "its refusal: .*no attribute"),
        ("{{ 1 // 0 }}", "its refusal: .*zero"),
    ],
)
def test_whatever_a_template_raises_is_its_refusal(template, words):
    with pytest.raises(DataError, match=f"field 'prompt': .*{words}"):
        Renderer(tiny_tokenizer(template))([SYSTEM, USER], {"a": ANSWER})


def test_an_answer_that_the_template_refuses_is_named():
    refuses = CHATML.replace(
        "{{ m.content }}", "{% if m.name %}{{ raise_exception('no names') }}{% endif %}{{ m.content }}"
    )
    with pytest.raises(DataError, match=r"field 'b': .*its refusal: no names"):
        Renderer(tiny_tokenizer(refuses))([USER], {"a": ANSWER, "b": ANSWER | {"name": "Ann"}})


def test_a_conversation_that_does_not_start_with_its_prompt_is_refused():
    with pytest.raises(DataError, match=r"field 'a': .*starts with its prompt, .*<think>.*chat_template_kwargs"):
        Renderer(tiny_tokenizer(OPENS_A_THOUGHT))([USER], {"a": ANSWER})


def test_an_answer_that_the_template_writes_nothing_of_is_refused():
    only_prompt = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="field 'a': expected a response, got nothing"):
        Renderer(tiny_tokenizer(only_prompt))([USER], {"a": ANSWER})


def test_a_template_that_ends_no_turn_is_known():
    renderer = Renderer(tiny_tokenizer(HEADERS))
    assert renderer.ends_its_turns(renderer([USER], {"a": ANSWER}).whole["a"])
    renderer = Renderer(tiny_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}"))
    assert not renderer.ends_its_turns(renderer([USER], {"a": ANSWER}).whole["a"])


def test_a_tokenizer_without_a_chat_template_is_told_the_ways_out():
    ways = "Take that of the chat version of the model, or set tokenizer.chat_template: to a template, or to wrpo"
    with pytest.raises(DataError, match=rf"expected a tokenizer with a chat template, got one without\. {ways}"):
        Renderer(tiny_tokenizer(None))
