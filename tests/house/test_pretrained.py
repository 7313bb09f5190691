"""The model and the tokenizer that the settings name: what is loaded, and what is refused in one line."""

from __future__ import annotations

import logging

import pytest
from jinja2.exceptions import TemplateError
from tiny_models import tiny_model
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import AutoTokenizer

from wrpo.pretrained import load_model, load_tokenizer, require_template, warn_of_coarse_weights
from wrpo.settings import ModelSettings, SettingsError


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model with a tokenizer of this template; returns the settings that load it."""

    def save(template: str | None = CHATML, adds_bos: bool = False, **settings) -> ModelSettings:
        tokenizer = tiny_tokenizer(template, adds_bos)
        tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return ModelSettings(str(tmp_path / "model"), **settings)

    return save


@pytest.mark.parametrize("content", [b"\xff", None], ids=["not UTF-8", "a folder"])
def test_a_chat_template_that_is_no_text_is_named(content, saved, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(content) if content else path.mkdir()
    with pytest.raises(SettingsError, match=r"chat_template_file: .*template\.jinja"):
        load_tokenizer(saved(chat_template_file=str(path)))


def test_only_training_speaks_of_coarse_weights(saved, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("wrpo"), "propagate", True)
    model = load_model(saved(torch_dtype="bfloat16"))
    assert "wants torch_dtype" not in caplog.text
    warn_of_coarse_weights(model)
    assert "wants torch_dtype: float32" in caplog.text


PROMPT = [{"role": "user", "content": "2 + 3?"}]
ANSWER = {"role": "assistant", "content": " 5"}


@pytest.mark.parametrize(("adds_bos", "start"), [(False, ""), (True, "<bos>")])
def test_chat_template_none_writes_prompt_answer_and_end_and_is_saved_with_the_model(adds_bos, start, saved, tmp_path):
    tokenizer = load_tokenizer(saved(CHATML, adds_bos, chat_template="none"))
    tokenizer.save_pretrained(tmp_path / "trained")
    for template in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "trained")):
        assert template.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True) == f"{start}2 + 3?"
        assert template.apply_chat_template([*PROMPT, ANSWER], tokenize=False) == f"{start}2 + 3? 5<|im_end|>"
    started = [{"role": "user", "content": "<bos>hello"}]
    assert tokenizer.apply_chat_template(started, tokenize=False) == "<bos>hello", "no second beginning"


@pytest.mark.parametrize("messages", [[*PROMPT, *PROMPT], [*PROMPT, ANSWER, *PROMPT], [ANSWER]])
def test_chat_template_none_refuses_a_conversation(messages, saved):
    tokenizer = load_tokenizer(saved(chat_template="none"))
    with pytest.raises(TemplateError, match="chat_template none takes one message and its answer"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_chat_template_none_needs_an_end_of_sequence(saved, tmp_path):
    settings = saved(chat_template="none")
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SettingsError, match="chat_template none needs an eos_token"):
        load_tokenizer(settings)


def test_a_tokenizer_without_a_template_is_refused_and_one_with_is_not(saved):
    settings = saved(None)
    refused = "reward_model 'm': expected a tokenizer with a chat template, got one without. Take .* chat_template_file"
    with pytest.raises(SettingsError, match=f"{refused}$"):
        require_template(load_tokenizer(settings), "reward_model 'm'", may_be_none=False)
    with pytest.raises(SettingsError, match=f"{refused}, or set chat_template to none"):
        require_template(load_tokenizer(settings), "reward_model 'm'", may_be_none=True)
    settings = saved(None, chat_template="none")
    require_template(load_tokenizer(settings), "reward_model 'm'", may_be_none=True)
