"""Every form in which people hold data is read from a file in that form, as JSON lines and as Parquet."""

from __future__ import annotations

import contextlib
import json
import re

import datasets
import pytest

from wrpo.data.example import example_of
from wrpo.data.loading import load_examples
from wrpo.rows.errors import DataError

USER = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "be brief"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


ASKED = {"prompt": "2 + 3?"}
PAIR = [("target", 1.0, "5"), ("rejected", 1.0, "6")]
TRIPLE = [("source", 1.0, "five"), *PAIR]
SCORED = {"all_generated_responses": ["V", "5", "6", "7"], "all_rm_scores": [2.0, 4, 1.0, 3.0]}
RANKED = [{"rank": rank, "completion": [said(text)]} for rank, text in ((2, "6"), (0, "5"), (1, "V"))]

PREFERENCES = {
    # TRL: standard and conversational, explicit and implicit prompt
    "pair": (ASKED | {"chosen": "5", "rejected": "6"}, PAIR),
    "pair of messages": ({"prompt": [USER], "chosen": [said("5")], "rejected": [said("6")]}, PAIR),
    "pair of conversations": ({"chosen": [USER, said("5")], "rejected": [USER, said("6")]}, PAIR),
    "pair of texts that begin alike": (
        {"chosen": "2 + 3? 5", "rejected": "2 + 3? 6"},
        [("target", 1.0, " 5"), ("rejected", 1.0, " 6")],
    ),
    "UltraFeedback": (
        ASKED
        | {"chosen": [USER, said("5")], "rejected": [USER, said("6")], "messages": [USER, said("5")]}
        | {"score_chosen": 8.5, "score_rejected": 8.0},
        PAIR,
    ),
    "pair as JSON text": (
        {"prompt": json.dumps([USER]), "chosen": json.dumps([said("5")]), "rejected": json.dumps([said("6")])},
        PAIR,
    ),
    "pair as lists of JSON texts": (
        {"chosen": [json.dumps(USER), json.dumps(said("5"))], "rejected": [json.dumps(USER), json.dumps(said("6"))]},
        PAIR,
    ),
    # LLaMA-Factory
    "pair after an instruction": ({"instruction": "2 + 3?", "input": "", "chosen": "5", "rejected": "6"}, PAIR),
    "pair after ShareGPT's turns": (
        {
            "conversations": [{"from": "human", "value": "2 + 3?"}],
            "chosen": {"from": "gpt", "value": "5"},
            "rejected": {"from": "gpt", "value": "6"},
        },
        PAIR,
    ),
    # the paper's, and ours
    "released": (ASKED | {"chosen": ["five", "5"], "rejected": ["6"]}, TRIPLE),
    "released, as messages": ({"prompt": USER, "chosen": [said("five"), said("5")], "rejected": [said("6")]}, TRIPLE),
    "explicit": (ASKED | {"source_chosen": "five", "target_chosen": "5", "rejected": "6"}, TRIPLE),
    "explicit without a target": (
        ASKED | {"source_chosen": ["five", "V"], "rejected": "6"},
        [("source", 0.5, "five"), ("source", 0.5, "V"), ("rejected", 1.0, "6")],
    ),
    "explicit without a source": (ASKED | {"target_chosen": "5", "rejected": "6"}, PAIR),
    "several rejected": (
        ASKED | {"chosen": "5", "rejected": ["6", "7", "8", "9"]},
        [("target", 1.0, "5"), *[("rejected", 0.25, text) for text in "6789"]],
    ),
    "several rejected of unequal weight": (
        ASKED | {"chosen": "5", "rejected": ["6", "7"], "rejected_weight": [0.25, 0.75]},
        [("target", 1.0, "5"), ("rejected", 0.25, "6"), ("rejected", 0.75, "7")],
    ),
    "example": (
        ASKED | {"responses": ["6", "five", "5", "7"], "role": ["rejected", "source", "target", "rejected"]},
        [("source", 1.0, "five"), ("target", 1.0, "5"), ("rejected", 0.5, "6"), ("rejected", 0.5, "7")],
    ),
    # others
    "TPO": (ASKED | {"reference": "five", "chosen": "5", "rejected": "6"}, TRIPLE),
    "ms-swift, rejected text": ({"messages": [USER, said("5")], "rejected_response": "6"}, PAIR),
    "ms-swift, rejected messages": ({"messages": [USER, said("5")], "rejected_messages": [USER, said("6")]}, PAIR),
    "SimPO, best and worst": (ASKED | SCORED, PAIR),
    "SimPO, its own pair": (ASKED | SCORED | {"chosen": [USER, said("V")], "rejected": [USER, said("7")]},
                            [("target", 1.0, "V"), ("rejected", 1.0, "7")]),
    "NeMo, two completions": ({"context": [USER], "completions": RANKED[:2]}, PAIR),
    "NeMo, best and worst": ({"context": [USER], "completions": RANKED}, PAIR),
    "NeMo, with a prompt": (ASKED | {"completions": RANKED}, PAIR),
    "HelpSteer3, the second": ({"context": [USER], "response1": "6", "response2": "5", "overall_preference": 2}, PAIR),
    "HelpSteer3, the first": ({"context": [USER], "response1": "5", "response2": "6", "overall_preference": -1}, PAIR),
}  # fmt: skip

ALL_BY_SCORE = {
    # 2, 3 and 1 below the best
    "SimPO": (
        ASKED | SCORED | {"chosen": [USER, said("V")], "rejected": [USER, said("7")]},
        [("target", 1.0, "5"), ("rejected", 2 / 6, "V"), ("rejected", 3 / 6, "6"), ("rejected", 1 / 6, "7")],
    ),
    "one as good as the best is left out": (
        ASKED | SCORED | {"all_rm_scores": [4, 4, 3, 1]},
        [("target", 1.0, "V"), ("rejected", 1 / 4, "6"), ("rejected", 3 / 4, "7")],
    ),
    "NeMo": (
        {"context": [USER], "completions": RANKED},
        [("target", 1.0, "5"), ("rejected", 2 / 3, "6"), ("rejected", 1 / 3, "V")],
    ),
    "rows without scores stay what they are": (ASKED | {"chosen": "5", "rejected": "6"}, PAIR),
}

ANSWERS = {
    "messages": {"messages": [USER, said("5")]},
    "messages as JSON text": {"messages": json.dumps([USER, said("5")])},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
    "ShareGPT's name, messages": {"conversations": [USER, said("5")]},
    "alpaca": {"instruction": "2 + 3?", "input": "", "output": "5"},
    "completion": ASKED | {"completion": "5"},
    "completion as messages": {"prompt": [USER], "completion": [said("5")]},
    "response": ASKED | {"response": "5", "model": "a", "sample": 0, "reward": 0.5},
    "a source's answer alone": ASKED | {"source_chosen": "5"},
    "a chosen answer alone": ASKED | {"chosen": ["5"]},
    "the source with the largest weight": ASKED
    | {"source_chosen": ["V", "5"], "source_weight": [0.25, 0.75], "target_chosen": "five", "rejected": "6"},
    "no preference is needed": ASKED | SCORED | {"all_rm_scores": [1, 1, 1, 1], "all_generated_responses": ["5"] * 4},
}


def write(path, rows: list[dict]):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_from_file(path, row: dict, **options) -> tuple[list[dict], list[tuple]]:
    """The prompt, and (role, share, text) of each response."""
    (example,) = load_examples(write(path, [row]), **options)
    texts = [json.loads(response)["content"] for response in example["responses"]]
    return json.loads(example["prompt"]), list(zip(example["role"], example["share"], texts, strict=True))


BESIDE = dict.fromkeys(
    "source_weight rejected_weight source_model score_chosen ref_logp source_logp share model reward tools "
    "chat_template_kwargs system history input conversations context".split()
)

FILES = pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet"])


@FILES
@pytest.mark.parametrize(("row", "expected"), PREFERENCES.values(), ids=PREFERENCES)
def test_every_form_of_preference_is_read(row, expected, file, tmp_path):
    assert read_from_file(tmp_path / file, row) == ([USER], expected)


@FILES
@pytest.mark.parametrize(("row", "expected"), ALL_BY_SCORE.values(), ids=ALL_BY_SCORE)
def test_all_answers_count_by_how_far_they_are_below_the_best(row, expected, file, tmp_path):
    prompt, responses = read_from_file(tmp_path / file, row, from_scores=True)
    assert prompt == [USER]
    assert [(role, text) for role, _, text in responses] == [(role, text) for role, _, text in expected]
    assert [share for _, share, _ in responses] == pytest.approx([share for _, share, _ in expected])


@FILES
@pytest.mark.parametrize("row", ANSWERS.values(), ids=ANSWERS)
def test_every_form_of_answer_is_read_for_fine_tuning(row, file, tmp_path):
    prompt, responses = read_from_file(tmp_path / file, row, stage="sft")
    assert prompt == [USER]
    assert [(share, text) for _, share, text in responses] == [(1.0, "5")]


@pytest.mark.parametrize(("row", "expected"), PREFERENCES.values(), ids=PREFERENCES)
def test_fine_tuning_takes_the_best_answer_of_every_preference(row, expected):
    example = example_of(row, stage="sft")
    assert [(example["role"], example["share"], [r["content"] for r in example["responses"]])] == [
        ([expected[0][0]], [1.0], [expected[0][2]])
    ]


def test_rows_of_different_forms_are_one_data_set(tmp_path):
    path = write(tmp_path / "mixed.jsonl", [row for row, _ in PREFERENCES.values()])
    assert load_examples(path)["role"][:] == [[role for role, _, _ in roles] for _, roles in PREFERENCES.values()]


def test_reading_what_was_read_changes_nothing():
    rows = [row for row, _ in PREFERENCES.values()]
    once = load_examples(rows)
    assert load_examples(once).remove_columns(["file", "row"])[:] == once.remove_columns(["file", "row"])[:]


# -- details of forms -------------------------------------------------------------------------------------------------


def test_a_system_text_and_earlier_turns_stand_before_an_instruction():
    row = {"system": "be brief", "history": [["1 + 1?", "2"]], "instruction": "add", "input": "2 + 3", "output": "5"}
    first = [SYSTEM, {"role": "user", "content": "1 + 1?"}, said("2")]
    assert example_of(row, stage="sft")["prompt"] == [*first, {"role": "user", "content": "add\n2 + 3"}]


SYSTEM_BESIDE = {
    "a text": {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"},
    "messages": {"prompt": [USER], "chosen": "5", "rejected": "6"},
    "conversations": {"chosen": [USER, said("5")], "rejected": [USER, said("6")]},
    "the same system message": {"prompt": [SYSTEM, USER], "chosen": "5", "rejected": "6"},
    "a triple": {"prompt": "2 + 3?", "source_chosen": ["five"], "target_chosen": "5", "rejected": "6"},
    "scores": {"prompt": "2 + 3?", "all_generated_responses": ["5", "6"], "all_rm_scores": [1, 0]},
}


@pytest.mark.parametrize("row", SYSTEM_BESIDE.values(), ids=SYSTEM_BESIDE)
def test_a_system_text_beside_any_form_is_the_first_message_of_its_prompt(row):
    assert example_of(row | {"system": "be brief"})["prompt"] == [SYSTEM, USER]
    assert example_of(row | {"system": " "})["prompt"] == example_of(row)["prompt"]


def test_two_system_texts_are_one_too_many():
    with pytest.raises(DataError, match="'system': expected the system message of the conversation, got 'another'"):
        example_of({"system": "another", "messages": [SYSTEM, USER, said("5")]}, stage="sft")


@pytest.mark.parametrize(("name", "value"), [("images", ["cat.png"]), ("image", {"bytes": "."}), ("audio", "a.wav")])
def test_a_row_with_pictures_or_sound_is_refused_by_name(name, value):
    row = {"prompt": "<image>what is it?", "chosen": "5", "rejected": "6"}
    with pytest.raises(DataError, match=f"'{name}': expected text alone"):
        example_of(row | {name: value})
    assert example_of(row | {name: type(value)()}) == example_of(row)


def test_a_turn_keeps_what_it_says_beside_its_text():
    turns = [{"from": "human", "value": "2 + 3?", "name": "Ann"}, {"from": "gpt", "value": "5"}]
    assert example_of({"conversations": turns}, stage="sft")["prompt"] == [USER | {"name": "Ann"}]


def test_sharegpts_speakers_become_roles_and_a_stranger_is_named():
    turns = [("human", "2 + 3?"), ("gpt", "wait"), ("observation", "5"), ("gpt", "5")]
    row = {"system": "be brief", "conversations": [{"from": name, "value": text} for name, text in turns]}
    prompt = [SYSTEM, USER, said("wait"), {"role": "tool", "content": "5"}]
    assert example_of(row, stage="sft")["prompt"] == prompt
    row["conversations"][1]["from"] = "parrot"
    with pytest.raises(DataError, match=r"'conversations': expected a turn from one of .*'gpt'.*got 'parrot'"):
        example_of(row, stage="sft")


def test_an_answer_that_happens_to_be_json_stays_text():
    chat = json.dumps([USER, said("5")])
    row = {"prompt": "Write a chat as JSON.", "chosen": chat, "rejected": "No."}
    assert example_of(row)["responses"] == [said(chat), said("No.")]
    row = {"prompt": "Write a chat as JSON.", "completion": chat}
    assert example_of(row, stage="sft")["responses"] == [said(chat)]


def test_names_scores_and_ranks_go_with_their_responses():
    names = {"response_model_names": ["a", "b", "c", "d"]}
    example = example_of(ASKED | SCORED | names)
    assert (example["model"], example["reward"]) == (["b", "c"], [4.0, 1.0])
    completions = [completion | {"reward": 0.5} for completion in RANKED[:2]]
    assert example_of({"context": "2 + 3?", "completions": completions})["reward"] == [0.5, 0.5]


NO_PREFERENCE = {
    "scores": ASKED | SCORED | {"all_rm_scores": [1, 1, 1, 1]},
    "one score": ASKED | {"all_generated_responses": ["5"], "all_rm_scores": [1]},
    "ranks": ASKED | {"completions": [completion | {"rank": 0} for completion in RANKED]},
    "HelpSteer3": {"context": [USER], "response1": "6", "response2": "5", "overall_preference": 0},
}


@pytest.mark.parametrize("from_scores", [False, True])
@pytest.mark.parametrize("row", NO_PREFERENCE.values(), ids=NO_PREFERENCE)
def test_answers_that_are_all_worth_the_same_are_refused(row, from_scores):
    with pytest.raises(DataError, match="no preference"):
        example_of(row, from_scores=from_scores)


BAD = {
    "a score too few": (ASKED | SCORED | {"all_rm_scores": [1, 2, 3]}, "all_rm_scores", "4 finite numbers"),
    "a score that is NaN": (ASKED | SCORED | {"all_rm_scores": [1, 2, 3, float("nan")]}, "all_rm_scores", "nan"),
    "no generated response": (ASKED | SCORED | {"all_generated_responses": []}, "all_generated_responses", r"\[\]"),
    "a name too few": (ASKED | SCORED | {"response_model_names": ["a"]}, "response_model_names", "4 names"),
    "completions without rank": (ASKED | {"completions": ["5", "6"]}, "completions", "{rank, completion}"),
    "a rank that is none": (
        ASKED | {"completions": [*RANKED[:1], {"rank": None, "completion": "5"}]},
        "completions.rank",
        "2 finite numbers",
    ),
    "a preference in words": (
        {"context": [USER], "response1": "6", "response2": "5", "overall_preference": "better"},
        "overall_preference",
        "1 finite number",
    ),
    "a role too few": (ASKED | {"responses": ["5", "6"], "role": ["target"]}, "role", "2 of source, target, rejected"),
    "an unknown role": (ASKED | {"responses": ["5", "6"], "role": ["target", "worst"]}, "role", "worst"),
    "no rejected": (ASKED | {"responses": ["5", "6"], "role": ["target", "source"]}, "rejected", "a rejected response"),
    "rejected alone": (ASKED | {"responses": ["5", "6"], "role": ["rejected"] * 2}, "role", "rejected ones alone"),
    "messages that are text": ({"messages": "2 + 3?", "rejected_response": "6"}, "messages", "a list of messages"),
    "messages that end with the user": ({"messages": [USER], "rejected_response": "6"}, "messages", "role 'user'"),
    "an instruction that is no text": ({"instruction": 3, "chosen": "5", "rejected": "6"}, "instruction", "text in"),
    "a history that is none": (
        {"instruction": "2 + 3?", "history": ["1 + 1?"], "chosen": "5", "rejected": "6"},
        "history",
        r"pairs \[question, answer\]",
    ),
    "two texts beside a null prompt": (
        {"prompt": None, "chosen": "I think 5", "rejected": "I think 6"},
        "prompt",
        "none",
    ),
    "two texts beside a question": (
        {"question": "2 + 3?", "chosen": "I think 5", "rejected": "I think 6"},
        "question",
        "Rename 'question' to 'prompt'",
    ),
    "two texts beside an input": (
        {"input": "2 + 3?", "chosen": "I think 5", "rejected": "I think 6"},
        "input",
        "Rename",
    ),
    "a pair with a source's answer": (
        ASKED | {"chosen": "5", "rejected": "6", "source_chosen": "five"},
        "chosen",
        "nothing beside 'rejected' and 'source_chosen', as which the row is read, got '5'",
    ),
    "a pair with a target's answer": (
        ASKED | {"chosen": "V", "rejected": "6", "target_chosen": "5"},
        "chosen",
        "one form",
    ),
    "an example with a pair": (
        ASKED | {"responses": ["5", "6"], "role": ["target", "rejected"], "rejected": "7"},
        "rejected",
        "nothing beside 'responses'",
    ),
    "a pair with another rejected one": (
        {"messages": [USER, said("5")], "rejected_response": "6", "rejected_messages": [USER, said("7")]},
        "rejected_messages",
        "one form",
    ),
    "a pair of one text": (ASKED | {"chosen": "5", "rejected": "5"}, "rejected", "one text for all 2, '5'"),
    "a triple of one text": (
        {"prompt": [USER], "chosen": [said("5"), [USER, said("5")]], "rejected": ["5"]},
        "rejected",
        "one text for all 3",
    ),
    "texts that begin with nothing alike": ({"chosen": "5", "rejected": "6"}, "prompt", "a value"),
    "texts that begin with no whole word alike": ({"chosen": "fifteen", "rejected": "fifty"}, "prompt", "a value"),
    "a text that is all prompt": ({"chosen": "2 + 3? 5", "rejected": "2 + 3?"}, "rejected", "not empty"),
}


@pytest.mark.parametrize(("row", "field", "words"), BAD.values(), ids=BAD)
def test_a_row_that_its_form_does_not_allow_is_named(row, field, words):
    with pytest.raises(DataError, match=rf"^field '{re.escape(field)}': .*{words}"):
        example_of(row)


WRONG = [3, float("nan"), True, "text", "", [], [None], [3], ["a", 3], {}, {"role": None}, [{"from": []}], [[]], [{}]]
WRONG += [[{"role": "assistant"}], [{"from": [], "value": 3}], [["a", "b"]], {"from": "gpt", "value": None}, b"bytes"]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_whatever_stands_in_a_field_a_row_is_read_or_refused_by_a_sentence(value):
    rows = [("preference", row) for row, _ in PREFERENCES.values()] + [("sft", row) for row in ANSWERS.values()]
    rows += [("preference", BESIDE | row) for row, _ in PREFERENCES.values()]
    for stage, row in rows:
        for field in row:
            for from_scores in (False, True):
                with contextlib.suppress(DataError):
                    example_of(row | {field: value}, stage=stage, from_scores=from_scores)


UNKNOWN = {
    "an answer alone": ("preference", ASKED | {"response": "5"}, "'chosen', 'rejected'", "'chosen' and 'rejected'"),
    "a misspelt field": ("preference", ASKED | {"chosen": "5", "reject": "6"}, "'chosen', 'rejected'", "'rejected'"),
    "sources": ("preference", ASKED | {"source_chosen": "5"}, "'source_chosen', 'rejected'", "'rejected'"),
    "scores without answers": (
        "preference",
        ASKED | {"all_rm_scores": [1, 2]},
        "'all_generated_responses', 'all_rm_scores'",
        "'all_generated_responses'",
    ),
    "messages": ("preference", {"messages": [USER, said("5")]}, "'messages', 'rejected_response'", "'rejected_resp"),
    "nothing known": ("preference", {"x": 1}, "'chosen', 'rejected'", "'chosen' and 'rejected'"),
    "alpaca without output": ("sft", {"instruction": "2 + 3?", "input": ""}, "'instruction', 'output'", "'output'"),
    "nothing known, SFT": ("sft", {"x": 1}, "'prompt', 'response'", "'prompt' and 'response'"),
}


@pytest.mark.parametrize(("stage", "row", "form", "lacking"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_row_of_no_form_is_told_its_fields_and_the_nearest_form(stage, row, form, lacking):
    fields = re.escape(str(sorted(row)))
    with pytest.raises(DataError, match=rf"got fields {fields}\. The nearest form has {form}: add or rename {lacking}"):
        example_of(row, stage=stage)


# What two texts begin with: (the prompt, what is left of the first, of the second).
BEGINNINGS = {
    "a word apart": ("What is it? Blue", "What is it? Green", "What is it?", " Blue", " Green"),
    "within a word": ("What is it? The fifteenth", "What is it? The fifty", "What is it? The", " fifteenth", " fifty"),
    "within a number": ("Sum of 7 and 8: 15", "Sum of 7 and 8: 150", "Sum of 7 and 8:", " 15", " 150"),
    "within a decimal": ("Pi is 3.14", "Pi is 3.2", "Pi is", " 3.14", " 3.2"),
    "within a contraction": ("Well, I can", "Well, I can't", "Well, I", " can", " can't"),
    "at an apostrophe": ("So I'm glad", "So I've gone", "So", " I'm glad", " I've gone"),
    "before an accent": ("Un cafe", "Un cafe\u0301", "Un", " cafe", " cafe\u0301"),
    "in Vietnamese": ("Trả lời ấm", "Trả lời ấy", "Trả lời", " ấm", " ấy"),
    "in Korean": ("답 다섯", "답 다여섯", "답", " 다섯", " 다여섯"),
    "in Chinese, without spaces": ("Q: 答案是五", "Q: 答案是六", "Q: 答案是", "五", "六"),
    "behind a mark": ("2 + 3?\n\nA:five", "2 + 3?\n\nA:six", "2 + 3?\n\nA:", "five", "six"),
    "on a new line": ("2 + 3?\nfive", "2 + 3?\nfifty", "2 + 3?\n", "five", "fifty"),
}  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected", "prompt", *"ab"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_prompt_that_two_texts_begin_with_ends_with_a_whole_word(chosen, rejected, prompt, a, b):
    example = example_of({"chosen": chosen, "rejected": rejected})
    assert [message["content"] for message in (*example["prompt"], *example["responses"])] == [prompt, a, b]


def test_fields_without_a_value_are_told_apart():
    with pytest.raises(DataError, match=r"got fields \['chosen', 'prompt'\], without a value \['rejected'\]"):
        example_of(ASKED | {"chosen": "5", "rejected": None})


def test_another_stage_is_refused():
    with pytest.raises(ValueError, match="stage: expected one of preference, sft, got 'dpo'"):
        example_of(ASKED | {"chosen": "5", "rejected": "6"}, stage="dpo")
