"""One row becomes one example: its prompt, its responses with their shares, and what else the row says of them."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest

from wrpo.data.example import example_of
from wrpo.rows.errors import DataError

USER = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "be brief"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}
EXPLICIT = {"prompt": "2 + 3?", "source_chosen": "five", "target_chosen": "5", "rejected": "6"}
RELEASED = {"prompt": "2 + 3?", "chosen": ["five", "5"], "rejected": ["6"]}
EXAMPLE = {
    "prompt": [USER],
    "responses": [said("five"), said("5"), said("6")],
    "role": ["source", "target", "rejected"],
    "share": [1.0, 1.0, 1.0],
    "model": [None, None, None],
    "reward": [None, None, None],
    "ref_logp": None,
    "source_logp": None,
    "cut": None,
    "tools": None,
    "chat_template_kwargs": None,
}

# -- the prompt and what repeats it -----------------------------------------------------------------------------------

SAME = {
    "explicit": EXPLICIT,
    "released": RELEASED,
    "prompt as a message": RELEASED | {"prompt": USER},
    "prompt as JSON text": RELEASED | {"prompt": json.dumps([USER])},
    "responses as messages": {"prompt": [USER], "chosen": [said("five"), said("5")], "rejected": [said("6")]},
    "responses as lists of one message": RELEASED
    | {"chosen": [[said("five")], [said("5")]], "rejected": [[said("6")]]},
    "prompt repeated before each response": {
        "prompt": "2 + 3?",
        "chosen": [[USER, said("five")], [USER, said("5")]],
        "rejected": [[USER, said("6")]],
    },
    "one rejected conversation without its list": RELEASED | {"rejected": [USER, said("6")]},
    "prompt only in the responses": {"chosen": [[USER, said("five")], "5"], "rejected": ["6"]},
    "explicit with a conversation": EXPLICIT | {"source_chosen": [USER, said("five")], "target_chosen": said("5")},
    "columns of other forms left empty": EXPLICIT | {"chosen": None, "source_weight": None, "source_model": None},
    "as an example itself": EXAMPLE,
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_all_ways_to_write_a_prompt_and_its_responses_give_the_same_example(row):
    assert example_of(row) == EXAMPLE


def test_a_system_turn_in_the_repeated_prompt_is_part_of_the_prompt():
    row = {"prompt": "2 + 3?", "chosen": [[SYSTEM, USER, said("five")], "5"], "rejected": "6"}
    assert example_of(row)["prompt"] == [SYSTEM, USER]


# -- shares, models, rewards, log-probs -------------------------------------------------------------------------------


def test_shares_are_equal_where_no_weight_is_given():
    row = EXPLICIT | {"source_chosen": ["a", "b", "c", "d"], "rejected": ["6", "7"]}
    assert example_of(row)["share"] == [*[0.25] * 4, 1.0, 0.5, 0.5]


def test_a_response_without_a_share_is_left_out_with_all_that_is_said_of_it():
    row = EXPLICIT | {
        "source_chosen": ["a", "b", "c"],
        "source_weight": [0.25, 0, 0.75],
        "source_model": ["A", "B", "C"],
        "source_reward": [1, 2, 3],
        "source_logp": [[-1.0], [-2.0], [-3.0], [-4.0], [-5.0]],
        "ref_logp": [-10, -20, -30, -40, -50],
    }
    example = example_of(row)
    assert [response["content"] for response in example["responses"]] == ["a", "c", "5", "6"]
    assert example["share"] == [0.25, 0.75, 1.0, 1.0]
    assert example["model"] == ["A", "C", None, None]
    assert example["reward"] == [1.0, 3.0, None, None]
    assert example["source_logp"] == [[-1.0], [-3.0], [-4.0], [-5.0]]
    assert example["ref_logp"] == [-10.0, -30.0, -40.0, -50.0]


def test_rewards_of_a_pair_and_of_a_built_triple_are_kept():
    assert example_of(PAIR | {"score_chosen": 8, "score_rejected": 2.5})["reward"] == [8.0, 2.5]
    built = EXPLICIT | {"source_reward": [3], "target_reward": 2, "rejected_reward": -1, "rejected_model": "small"}
    example = example_of(built | {"source_model": ["big"]})
    assert (example["reward"], example["model"]) == ([3.0, 2.0, -1.0], ["big", None, "small"])


def test_trls_reference_log_probs_are_read():
    assert example_of(PAIR | {"ref_chosen_logps": -3.5, "ref_rejected_logps": -7})["ref_logp"] == [-3.5, -7.0]
    with pytest.raises(DataError, match="'ref_logp': expected one for every response, got none for rejected"):
        example_of(PAIR | {"ref_chosen_logps": -3.5})


def test_responses_that_are_cut_are_marked_in_the_order_of_the_row():
    assert example_of(EXPLICIT | {"cut": [True, False, True]})["cut"] == [True, False, True]
    assert example_of(RELEASED | {"cut": [True, False, True]}, stage="sft")["cut"] == [True]
    assert example_of({"prompt": "2 + 3?", "response": "fi", "cut": True}, stage="sft")["cut"] == [True]


def test_a_sampled_answer_is_cut_where_it_says_so():
    row = {"prompt": "2 + 3?", "response": "fi"}
    for reason, cut in (("length", [True]), ("stop", [False]), (None, None)):
        assert example_of(row | {"finish_reason": reason}, stage="sft")["cut"] == cut


def test_reasons_why_responses_ended_tell_which_are_cut():
    reasons = EXPLICIT | {"finish_reason": ["length", None, "stop"]}
    assert example_of(reasons)["cut"] == [True, False, False]
    assert example_of(reasons | {"cut": [True, True, False]})["cut"] == [True, True, False]
    assert example_of(PAIR | {"finish_reason": ["stop", "max_tokens"]})["cut"] == [False, True]
    assert example_of(PAIR | {"finish_reason": "stop"})["cut"] is None, "of one of them, or of both"
    assert example_of({"messages": [USER, said("5")], "finish_reason": "length"}, stage="sft")["cut"] == [True]


AGREEING = {
    "reference": {"ref_logp": [-3.5, -7.0], "ref_chosen_logps": -3.5, "ref_rejected_logps": -7},
    "cut": {"cut": [True, False], "finish_reason": ["length", "stop"]},
    "scores": {"score_chosen": 2, "target_reward": 2.0, "score_rejected": 1},
}
CONTRARY = {
    "reference": (PAIR | {"ref_logp": [-3.5, -7], "ref_chosen_logps": -3.4}, "ref_logp", "-3.4 for chosen"),
    "cut": (PAIR | {"cut": [True, False], "finish_reason": ["stop", "stop"]}, "cut", "False for chosen"),
    "scores": (PAIR | {"score_chosen": 2, "target_reward": 3}, "target_reward", "2.0 for chosen, as in score_chosen"),
    "rewards of an example": (
        EXAMPLE | {"reward": [1, 2, 3], "rejected_reward": 4},
        "rejected_reward",
        "for responses.*, as in the row's scores",
    ),
    "names": (EXAMPLE | {"model": ["a", "b", "c"], "source_model": "d"}, "source_model", "for responses"),
}


@pytest.mark.parametrize("columns", AGREEING.values(), ids=AGREEING)
def test_columns_that_say_the_same_twice_are_read(columns):
    once = dict(list(columns.items())[:1])
    for what in ("ref_logp", "cut"):
        if what in once:
            assert example_of(PAIR | columns)[what] == example_of(PAIR | once)[what]
    assert example_of(PAIR | columns)["role"] == ["target", "rejected"]


@pytest.mark.parametrize(("row", "field", "words"), CONTRARY.values(), ids=CONTRARY)
def test_columns_that_contradict_each_other_are_refused(row, field, words):
    with pytest.raises(DataError, match=rf"^field '{field}': expected .*{words}.* Leave one of the two out"):
        example_of(row)


def test_an_examples_columns_are_put_in_the_order_of_its_roles():
    example = example_of(
        {
            "prompt": "2 + 3?",
            "responses": ["6", "five", "V", "5"],
            "role": ["rejected", "source", "source", "target"],
            "share": [1, 0.25, 0.75, 1],
            "model": [None, "A", "B", None],
            "reward": [0, 1, None, 2],
            "ref_logp": [-6, -5, -4, -3],
        }
    )
    assert example["role"] == ["source", "source", "target", "rejected"]
    assert example["share"] == [0.25, 0.75, 1.0, 1.0]
    assert example["model"] == ["A", "B", None, None]
    assert example["reward"] == [1.0, None, 2.0, 0.0]
    assert example["ref_logp"] == [-5.0, -4.0, -3.0, -6.0]


def test_fine_tuning_keeps_the_first_of_equal_sources():
    assert example_of(EXPLICIT | {"source_chosen": ["a", "b"]}, stage="sft")["responses"] == [said("a")]


# -- what the chat template reads -------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}


def test_messages_keep_every_field_that_they_have():
    prompt = [
        USER | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    answer = said("5") | {"reasoning_content": "The tool said it."}
    example = example_of({"prompt": prompt, "chosen": [answer], "rejected": [said("6")]})
    assert example["prompt"] == prompt
    assert example["responses"] == [answer, said("6")]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_call_of_a_tool_is_an_answer(content):
    call = {"role": "assistant", **content, "tool_calls": [CALL]}
    assert example_of({"prompt": [USER], "chosen": [call], "rejected": "6"})["responses"] == [call, said("6")]


def test_a_field_that_is_null_is_no_field():
    answer = said("5") | {"tool_calls": None, "name": None}
    assert example_of(PAIR | {"chosen": [answer]})["responses"][0] == said("5")


@pytest.mark.parametrize("write", [lambda value: value, json.dumps], ids=["as they are", "JSON text"])
def test_tools_and_options_of_the_template_are_handed_on(write):
    options = {"enable_thinking": False}
    example = example_of(PAIR | {"tools": write([TOOL]), "chat_template_kwargs": write(options)})
    assert (example["tools"], example["chat_template_kwargs"]) == ([TOOL], options)


def test_tools_of_which_each_is_json_text_are_read():
    assert example_of(PAIR | {"tools": [json.dumps(TOOL)]})["tools"] == [TOOL]


@pytest.mark.parametrize("empty", [[], "", " ", "[]", None])
def test_no_tools_are_none(empty):
    assert example_of(PAIR | {"tools": empty})["tools"] is None


# -- bad rows ---------------------------------------------------------------------------------------------------------

TWO = EXPLICIT | {"source_chosen": ["a", "b"]}
BAD = {
    "no prompt": ({"chosen": ["a", "b"], "rejected": ["c"]}, "prompt", "a value"),
    "prompt is a number": (RELEASED | {"prompt": 3}, "prompt", "got 3"),
    "blank prompt": (RELEASED | {"prompt": " \n"}, "prompt", "not empty"),
    "message without a role": (RELEASED | {"prompt": {"content": "hi"}}, "prompt", "with a role"),
    "message without content": (RELEASED | {"prompt": {"role": "user"}}, "prompt.content", "NoneType"),
    "content in parts": (
        RELEASED | {"prompt": {"role": "user", "content": [{}]}},
        "prompt.content",
        "list",
    ),
    "parts beside a call": (
        PAIR | {"chosen": [{"role": "assistant", "content": [{}], "tool_calls": [CALL]}]},
        "chosen.content",
        "list",
    ),
    "prompt ends with an answer": (RELEASED | {"prompt": [USER, said("5")]}, "prompt", "not the assistant's"),
    "empty chosen": (RELEASED | {"chosen": []}, "chosen", "an empty list"),
    "rejected is null": (RELEASED | {"rejected": None}, "rejected", "without a value"),
    "rejected is a number": (EXPLICIT | {"rejected": 6}, "rejected", "got 6"),
    "blank response": (RELEASED | {"chosen": ["five", "\n"]}, "chosen[1]", "not empty"),
    "response is a number": (EXPLICIT | {"source_chosen": ["five", 5]}, "source_chosen[1]", "got 5"),
    "response ends with the user": (RELEASED | {"rejected": [[said("a"), USER]]}, "rejected[0]", "role 'user'"),
    "prompts differ": (RELEASED | {"chosen": [[USER, said("a")], [SYSTEM, USER, said("b")]]}, "chosen[1]", "same"),
    "another prompt": (RELEASED | {"prompt": "4 + 4?", "rejected": [[USER, said("6")]]}, "prompt", "4 \\+ 4"),
    "half a surrogate pair": (EXPLICIT | {"rejected": "a\ud83d"}, "rejected", "UTF-8"),
    "half a surrogate pair in a call": (
        PAIR | {"chosen": [{"role": "assistant", "tool_calls": [{"name": "\ud83d"}]}]},
        "chosen.tool_calls",
        "UTF-8",
    ),
    "a date in a message": (PAIR | {"chosen": [said("5") | {"at": datetime(2026, 1, 1)}]}, "chosen.at", "JSON has"),
    "weight too many": (EXPLICIT | {"source_weight": [0.5, 0.5]}, "source_weight", "1 number"),
    "weight negative": (TWO | {"source_weight": [1.5, -0.5]}, "source_weight", ">= 0"),
    "weight NaN": (EXPLICIT | {"source_weight": [float("nan")]}, "source_weight", "nan"),
    "weights short of 1": (TWO | {"source_weight": [0.5, 0.4]}, "source_weight", "0.9"),
    "weight beyond any float": (TWO | {"source_weight": [10**400, 1]}, "source_weight", "sum inf"),
    "weights whose sum is beyond": (TWO | {"source_weight": [1e308, 1e308]}, "source_weight", "sum inf"),
    "weight is text": (EXPLICIT | {"source_weight": "1"}, "source_weight", "'1'"),
    "weights of the rejected": (PAIR | {"rejected": ["6", "7"], "rejected_weight": [1, 1]}, "rejected_weight", "sum 2"),
    "shares of a role": (EXAMPLE | {"share": [0.5, 1, 1]}, "share", "sum 0.5"),
    "too few shares": (EXAMPLE | {"share": [1, 1]}, "share", "3 finite numbers"),
    "reward beyond any float": (EXPLICIT | {"source_reward": [10**400]}, "source_reward", "1 finite number"),
    "too few rewards": (EXPLICIT | {"source_reward": []}, "source_reward", "1 finite number"),
    "reward infinite": (EXPLICIT | {"source_reward": [float("inf")]}, "source_reward", "inf"),
    "score in words": (PAIR | {"score_chosen": "good"}, "score_chosen", "'good'"),
    "too few models": (TWO | {"source_model": ["m"]}, "source_model", "2 names"),
    "model is a number": (EXPLICIT | {"source_model": 7}, "source_model", "got 7"),
    "model that is no text": (EXPLICIT | {"source_model": ["\ud800"]}, "source_model", "half a surrogate pair"),
    "role that is no text": (EXPLICIT | {"prompt": [{"role": "\ud800", "content": "hi"}]}, "prompt.role", "half a"),
    "log-prob beyond any float": (EXPLICIT | {"source_logp": [[-(10**400)]] * 3}, "source_logp", "finite mean"),
    "cut of sources alone": (EXPLICIT | {"cut": [True]}, "cut", "expected 3 truth values"),
    "one reason for a pair": (PAIR | {"finish_reason": "length"}, "finish_reason", "expected 2 reasons"),
    "too few reasons": (PAIR | {"finish_reason": ["length"]}, "finish_reason", "expected 2 reasons"),
    "reasons as numbers": (PAIR | {"finish_reason": [1, 0]}, "finish_reason", "expected 2 reasons"),
    "cut as numbers": (EXPLICIT | {"cut": [1, 0, 0]}, "cut", "expected 3 truth values"),
    "log-probs of sources alone": (EXPLICIT | {"source_logp": [[-1.0]]}, "source_logp", "3 lists"),
    "log-probs of other models": (EXPLICIT | {"source_logp": [[-1.0], [-1.0, -2.0], [-1.0]]}, "source_logp", "3 lists"),
    "log-probs of no model": (EXPLICIT | {"source_logp": [[], [], []]}, "source_logp", "3 lists"),
    "log-prob above zero": (EXPLICIT | {"source_logp": [[-1.0], [0.5], [-1.0]]}, "source_logp", "at most 0"),
    "log-prob is NaN": (EXPLICIT | {"source_logp": [[-1.0], [-1.0], [float("nan")]]}, "source_logp", "finite"),
    "too few of the reference": (EXPLICIT | {"ref_logp": [-1.0]}, "ref_logp", "3 finite numbers"),
    "reference above zero": (PAIR | {"ref_logp": [3.5, -1.0]}, "ref_logp", "at most 0"),
    "tools of another name": (PAIR | {"functions": [TOOL]}, "functions", "under the name of tools"),
    "tools that are no list": (PAIR | {"tools": {"name": "add"}}, "tools", "a list of tools"),
    "a tool that is a number": (PAIR | {"tools": [3]}, "tools", "tools that are objects"),
    "tools that are no JSON": (PAIR | {"tools": "add"}, "tools", "JSON text"),
    "options that are no mapping": (PAIR | {"chat_template_kwargs": "[1]"}, "chat_template_kwargs", "a mapping"),
}


@pytest.mark.parametrize(("row", "field", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_with_its_field(row, field, words):
    with pytest.raises(DataError, match=rf"^field '{re.escape(field)}': .*{words}"):
        example_of(row)
