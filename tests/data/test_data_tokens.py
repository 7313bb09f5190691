"""Tokens join as the model sees them, are kept until what decides them changes, and are cut by one simple rule."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import datasets
import pytest
from tiny_tokenizer import CHATML, HEADERS, MERGED_SYSTEM, OPENS_A_THOUGHT, REFUSES_SYSTEM, tiny_tokenizer

from wrpo.data import DataError, load_examples, tokenize_examples
from wrpo.data.truncation import truncate
from wrpo.pretrained import plain_template
from wrpo.settings import SettingsError

USER = {"role": "user", "content": "2 + 3?"}
SYSTEM = {"role": "system", "content": "be brief"}
EXPLICIT = {"prompt": "2 + 3?", "source_chosen": "five", "target_chosen": "5", "rejected": "6"}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenized(tokenizer, *rows: dict, **options) -> datasets.Dataset:
    return tokenize_examples(load_examples(list(rows)), tokenizer, **options)


def random_text(rng: random.Random) -> str:
    """Words, digits, punctuation, newlines and letters outside ASCII; starts with what is no space."""
    pieces = ["five", " two", " 2", "?!", "\n", "\n\n", "  ", "é", "漢", "😀", " model", "\tx"]
    return rng.choice("ax5é") + "".join(rng.choices(pieces, k=rng.randrange(12)))


def random_prompt(rng: random.Random) -> list[dict]:
    turns = [{"role": "user", "content": random_text(rng)}]
    for _ in range(rng.randrange(3)):
        turns += [said(random_text(rng)), {"role": "user", "content": random_text(rng)}]
    return [{"role": "system", "content": random_text(rng)}] * rng.randrange(2) + turns


@pytest.mark.parametrize("template", [CHATML, HEADERS, MERGED_SYSTEM], ids=["chatml", "headers", "merged system"])
def test_prompt_and_response_ids_join_to_the_rendered_conversation(template):
    rng = random.Random(0)
    tokenizer = tiny_tokenizer(template)
    rows = [
        {"prompt": random_prompt(rng), "chosen": [random_text(rng), random_text(rng)], "rejected": random_text(rng)}
        for _ in range(80)
    ]
    for row, tokens in zip(rows, tokenized(tokenizer, *rows), strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert tokens["prompt_ids"] == prompt
        for text, response in zip([*row["chosen"], row["rejected"]], tokens["response_ids"], strict=True):
            whole = tokenizer.apply_chat_template([*row["prompt"], said(text)])["input_ids"]
            after = whole[len(prompt) + len(response) :]  # what some templates write after the end of the turn
            assert prompt + response + after == whole
            assert tokenizer.decode(after).strip() == ""
            assert response[-1] == tokenizer.eos_token_id
            assert text.strip() in tokenizer.decode(response)


def test_a_response_that_would_merge_with_the_prompt_starts_where_generation_starts():
    tokenizer = tiny_tokenizer(CHATML)
    (row,) = tokenized(tokenizer, EXPLICIT | {"source_chosen": "\n\nfive"})
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([USER, said("\n\nfive")])["input_ids"]
    assert whole[: len(prompt)] != prompt, "this tokenizer was meant to merge the three newlines"
    assert row["prompt_ids"] == prompt
    assert tokenizer.decode(row["response_ids"][0]) == "\n\nfive<|im_end|>"


@pytest.mark.parametrize("template", [HEADERS, MERGED_SYSTEM])
def test_the_beginning_of_sequence_token_comes_once(template):
    tokenizer = tiny_tokenizer(template, adds_bos=True)
    (row,) = tokenized(tokenizer, EXPLICIT)
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in row["response_ids"][2]


@pytest.mark.parametrize(("adds_bos", "front"), [(False, ""), (True, "<bos>")])
def test_without_a_chat_template_the_text_is_prompt_response_and_end_where_that_is_asked_for(adds_bos, front):
    tokenizer = tiny_tokenizer(None, adds_bos=adds_bos)
    with pytest.raises(DataError, match=r"a chat template, got one without.*plain_template\(tokenizer\)"):
        tokenized(tokenizer, EXPLICIT)
    tokenizer.chat_template = plain_template(tokenizer)
    (row,) = tokenized(tokenizer, EXPLICIT | {"prompt": "2 + 3 = "})
    assert tokenizer.decode(row["prompt_ids"]) == front + "2 + 3 = "
    assert tokenizer.decode(row["response_ids"][1]) == "5<|im_end|>"
    with pytest.raises(DataError, match=r"field 'prompt'.*chat_template none takes one message and its answer"):
        tokenized(tokenizer, EXPLICIT | {"prompt": [SYSTEM, USER]})


def test_a_tokenizer_that_cannot_end_a_response_is_refused():
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(SettingsError, match="chat_template none needs an eos_token to end an answer"):
        plain_template(tokenizer)


def test_a_template_that_ends_no_turn_is_warned_of(caplog):
    tokenized(tiny_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}"), EXPLICIT)
    assert "the model cannot learn where to stop" in caplog.text


# As Llama 2: a space before the end; as Phi 3: an end of the turn, and one of the conversation.
SPACED = (
    "{% for m in messages %}{{ m.role }} {{ m.content | trim }} <|im_end|>{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt }}"
)
TWICE = CHATML.replace("{% endfor %}", "{% endfor %}{{ '<bos>' if not add_generation_prompt }}")


@pytest.mark.parametrize("template", [CHATML, HEADERS, MERGED_SYSTEM, SPACED, TWICE])
def test_a_response_that_came_cut_has_no_end_and_the_others_have(template):
    tokenizer = tiny_tokenizer(template)
    whole, cut = tokenized(tokenizer, EXPLICIT, EXPLICIT | {"cut": [True, False, True]})
    assert [tokenizer.decode(ids) for ids in cut["response_ids"]][::2] == ["five", "6"]
    assert cut["response_ids"][1] == whole["response_ids"][1]
    assert all(ids[-1] in tokenizer.all_special_ids for ids in whole["response_ids"])


def test_a_cut_response_in_the_first_row_is_no_reason_to_doubt_the_template(caplog):
    tokenized(tiny_tokenizer(), EXPLICIT | {"cut": [True, True, True]})
    assert "cannot learn where to stop" not in caplog.text


def test_a_prompt_the_template_refuses_is_named_or_skipped(caplog):
    rows = [EXPLICIT, EXPLICIT | {"prompt": [SYSTEM, USER]}]
    with pytest.raises(DataError, match=r"rows, row 2, field 'prompt'.*no system turns"):
        tokenized(tiny_tokenizer(REFUSES_SYSTEM), *rows)
    kept = tokenized(tiny_tokenizer(REFUSES_SYSTEM), *rows, skip_bad_rows=True)
    assert len(kept) == 1
    assert "1 bad row skipped (prompt 1" in caplog.text


def test_a_row_of_which_the_template_loses_words_is_named_or_skipped(caplog):
    only_user = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    rows = [EXPLICIT, EXPLICIT | {"system": "be brief"}]
    with pytest.raises(DataError, match=r"rows, row 2, field 'prompt': .* that writes all of the system message"):
        tokenized(tiny_tokenizer(only_user), *rows)
    assert len(tokenized(tiny_tokenizer(only_user), *rows, skip_bad_rows=True)) == 1
    assert "1 bad row skipped (prompt 1" in caplog.text


def test_what_was_changed_on_the_way_is_counted_by_rows_also_when_the_ids_are_read_again(caplog):
    rows = [
        EXPLICIT | {"target_chosen": "5<|im_end|>"},
        EXPLICIT | {"source_chosen": "five<|im_end|>\n<|im_start|>user\nmore?", "target_chosen": "5<|im_end|>"},
        EXPLICIT | {"prompt": "hi <|im_start|>"},
        EXPLICIT | {"rejected": "5"},
        EXPLICIT | {"rejected": "5<|im_end|>"},
    ]
    for _ in range(2):
        caplog.clear()
        tokens = tokenized(tiny_tokenizer(), *rows)
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "3 rows: answer cut before the end of turn '<|im_end|>' in its text",
            "2 rows: rejected response that is the same as a preferred one: it teaches nothing",
            "1 row: control token '<|im_start|>' in the text of a prompt: the model reads it as one, not as words",
        ]
    ends = [ids.count(3) for row in tokens for ids in row["response_ids"]]
    assert ends == [1] * len(ends)
    assert "remarks" not in tokens.column_names


def test_rewards_against_the_order_of_the_row_and_answers_that_came_cut_are_counted(caplog):
    rewarded = EXPLICIT | {"source_reward": [2.0], "target_reward": 3.0, "rejected_reward": 1.0}
    tokenized(
        tiny_tokenizer(),
        rewarded,
        rewarded | {"target_reward": 0.5},
        rewarded | {"source_reward": [0.5], "cut": [False, False, True]},
        EXPLICIT | {"target_reward": 0.5},
        EXPLICIT | {"finish_reason": ["length", "stop", "stop"]},
    )
    assert sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING") == [
        "2 rows: a rejected response with a higher reward than a preferred one: the row's own order holds",
        "2 rows: a response that came cut: it is trained without an end of turn",
    ]


def test_a_template_whose_conversation_leaves_its_prompt_is_refused():
    with pytest.raises(DataError, match=r"conversation starts with its prompt, .*<think>.*chat_template_kwargs"):
        tokenized(tiny_tokenizer(OPENS_A_THOUGHT), EXPLICIT)


def test_chat_template_kwargs_reach_the_template():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ opening }}{% endif %}")
    with pytest.raises(DataError, match="chat_template_kwargs"):
        tokenized(tiny_tokenizer(template), EXPLICIT, chat_template_kwargs={"opening": "well"})
    assert len(tokenized(tiny_tokenizer(template), EXPLICIT)) == 1


def test_token_ids_are_kept_on_disk_until_something_that_decides_them_changes():
    def cached(template=CHATML, row=EXPLICIT, **options) -> str:
        return tokenized(tiny_tokenizer(template), row, **options).cache_files[0]["filename"]

    assert cached() == cached()
    assert len({cached(), cached(HEADERS), cached(row=EXPLICIT | {"rejected": "7"}), cached(max_length=9)}) == 4


def test_without_sources_the_version_of_the_package_decides_whether_token_ids_are_kept(monkeypatch):
    def installed_without(module):
        raise OSError("could not get source code")

    def kept_in() -> str:
        return tokenized(tiny_tokenizer(), EXPLICIT).cache_files[0]["filename"]

    monkeypatch.setattr("wrpo.data.tokenization.inspect", SimpleNamespace(getsource=installed_without))
    first = kept_in()
    assert kept_in() == first
    monkeypatch.setattr("wrpo.data.tokenization.__version__", "another")
    assert kept_in() != first


def test_tools_and_options_of_a_row_reach_the_template_and_messages_keep_their_fields():
    template = (
        "{% for t in tools or [] %}<|start|>tool {{ t.name }}<|end|>{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }} {{ m.reasoning_content or '' }}|{{ m.content or '' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    row = {
        "prompt": "2 + 3?", "tools": [{"name": "sum"}],
        "chosen": [{"role": "assistant", "content": "five", "reasoning_content": "two and three"}], "rejected": "6",
    }  # fmt: skip
    tokenizer = tiny_tokenizer(template)
    (tokens,) = tokenized(tokenizer, row)
    assert tokenizer.decode(tokens["prompt_ids"]).startswith("<|start|>tool sum<|end|>")
    assert tokenizer.decode(tokens["response_ids"][0]) == "two and three|five<|im_end|>"


def test_a_column_of_log_probs_is_there_where_a_row_brings_it_and_nowhere_else():
    pair = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}
    assert not {"ref_logp", "source_logp"} & set(tokenized(tiny_tokenizer(), pair).column_names)
    (row,) = tokenized(tiny_tokenizer(), pair | {"ref_logp": [-1.0, -2.0]})
    assert row["ref_logp"] == [-1.0, -2.0]


def test_two_processes_give_the_same_tokens():
    rows = [EXPLICIT | {"rejected": str(i)} for i in range(8)]
    alone = tokenized(tiny_tokenizer(), *rows)[:]
    datasets.disable_caching()
    try:
        assert tokenized(tiny_tokenizer(), *rows, num_proc=2)[:] == alone
    finally:
        datasets.enable_caching()


# -- truncation -------------------------------------------------------------------------------------------------------

TRUNCATION = {  # prompt and responses as lengths: (before, limits) -> after
    "a row that fits stays": ((5, [5, 2]), (10, None), (5, [5, 2])),
    "a long prompt is cut to its own limit first": ((8, [1, 1]), (10, 4), (4, [1, 1])),
    "the prompt gives way down to what fits": ((8, [4, 1]), (10, None), (6, [4, 1])),
    "but keeps half of max_length": ((8, [7, 1]), (10, None), (5, [5, 1])),
    "a short prompt stays whole": ((3, [20, 7, 8]), (10, None), (3, [7, 7, 7])),
    "each response is cut on its own": ((2, [20, 1, 8]), (10, None), (2, [8, 1, 8])),
    "no limit at all": ((50, [70]), (None, None), (50, [70])),
    "the shortest row possible": ((9, [9]), (2, None), (1, [1])),
    "a prompt limit above max_length": ((9, [3]), (4, 8), (2, [2])),
}


@pytest.mark.parametrize(("before", "limits", "after"), TRUNCATION.values(), ids=TRUNCATION)
def test_truncation_keeps_the_prompts_end_and_the_responses_start(before, limits, after):
    prompt = list(range(before[0]))
    responses = [list(range(100, 100 + length)) for length in before[1]]
    kept_prompt, kept = truncate(prompt, responses, max_length=limits[0], max_prompt_length=limits[1])
    assert kept_prompt == prompt[len(prompt) - after[0] :]
    assert kept == [response[:length] for response, length in zip(responses, after[1], strict=True)]


def test_truncation_never_leaves_a_response_less_than_half_or_exceeds_the_length():
    rng = random.Random(1)
    for _ in range(500):
        prompt = [0] * rng.randrange(40)
        responses = [[1] * rng.randrange(1, 40) for _ in range(rng.randrange(1, 4))]
        most = rng.randrange(2, 50)
        kept_prompt, kept = truncate(
            prompt, responses, max_length=most, max_prompt_length=rng.choice([None, 1, 10, 60])
        )
        for before, after in zip(responses, kept, strict=True):
            assert len(kept_prompt) + len(after) <= most
            assert after == before or len(after) >= most / 2


def test_a_beginning_of_sequence_token_survives_the_cut():
    options = {"max_length": 6, "bos_token_id": 1}
    assert truncate([1, 2, 3, 4, 5], [[9, 9, 9]], **options)[0] == [1, 4, 5]
    assert truncate([2, 1, 3, 4, 5], [[9, 9, 9]], **options)[0] == [3, 4, 5]


def test_what_was_cut_is_reported_once_and_an_uncut_set_is_no_warning(caplog):
    caplog.set_level(logging.INFO, logger="wrpo.data")
    long = EXPLICIT | {"prompt": "x" * 30, "rejected": "x" * 50}
    tokenizer = tiny_tokenizer(None)
    tokenizer.chat_template = plain_template(tokenizer)
    rows = tokenized(tokenizer, EXPLICIT, long, max_length=20)
    assert list(map(len, [rows[1]["prompt_ids"], *rows[1]["response_ids"][1:]])) == [10, 2, 10]
    reports = [record for record in caplog.records if "tokenised" in record.message]
    # 30 + 51 tokens: the prompt is cut to 10, the rejected answer to 10.
    assert [r.message for r in reports] == [
        "2 rows tokenised: 1 prompts cut by 20 tokens, 1 of 6 responses cut by 41 tokens, no bad rows"
    ]
    assert reports[0].levelno == logging.WARNING
    tokenized(tokenizer, EXPLICIT)
    assert caplog.records[-1].levelno == logging.INFO


@pytest.mark.parametrize("limits", [{"max_length": 1}, {"max_prompt_length": 0}])
def test_a_limit_that_cannot_be_met_is_refused(limits):
    with pytest.raises(ValueError, match=f"{next(iter(limits))}: expected at least"):
        tokenized(tiny_tokenizer(), EXPLICIT, **limits)
