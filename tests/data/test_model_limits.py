"""Rows that a model has no row or position for are named before it meets them, with what to do."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_rows
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from wrpo.data.collation import pad_token
from wrpo.data.lengths import largest_id, lengths_of, longest_sequences
from wrpo.data.model_limits import keep_padding_inside, position_table, refuse_beyond, vocabulary_size

FORMS = [list, datasets.Dataset.from_list]
# Families whose positions are a table. OPT's begins at 2, RoBERTa's behind the padding, GPT-J's is no parameter.
TABLES = {
    "GPT2Config": {"n_positions": 16},
    "GPTNeoConfig": {"attention_types": [[["global"], 1]], "num_layers": 1},
    "OPTConfig": {"ffn_dim": 8, "word_embed_proj_dim": 8},
    "GPTJConfig": {"n_positions": 16, "rotary_dim": 4},
    "BioGptConfig": {},
    "RobertaConfig": {"is_decoder": True, "max_position_embeddings": 18, "pad_token_id": 1},
}
SMALL = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def model_of(name: str, **changes) -> torch.nn.Module:
    config = getattr(transformers, name)(**{**SMALL, "max_position_embeddings": 16, **TABLES.get(name, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def row(prompt: int, *responses: int) -> dict:
    return {
        "prompt_ids": [5] * prompt,
        "response_ids": [[5] * length for length in responses],
        "role": ["target"] * len(responses),
    }


@pytest.mark.parametrize("form", FORMS)
def test_lengths_and_the_largest_id_are_those_of_the_rows(form):
    rows = [row(2, 3, 1), row(1, 4), {**row(3, 1, 1), "response_ids": [[7], [9]]}]
    assert [lengths for _, lengths, _ in lengths_of(form(rows))] == [[3, 1], [4], [1, 1]]
    assert longest_sequences(form(rows)) == [5, 5, 4]
    assert largest_id(form(rows)) == 9
    assert largest_id(form([{**row(1, 1), "prompt_ids": [11]}])) == 11


@pytest.mark.parametrize("form", FORMS)
def test_an_id_beyond_the_embedding_is_named_with_its_token(form):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    rows = tiny_rows(3)
    refuse_beyond(form(rows), model, tokenizer)
    rows[1]["response_ids"][2] = [4, len(tokenizer) - 1]
    with pytest.raises(ValueError, match=rf"^rows: the token id {len(tokenizer) - 1} \('<new>'\) is beyond .* have "):
        refuse_beyond(form(rows), model, tokenizer)
    assert rows[1]["response_ids"][2][-1] == vocabulary_size(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_id_of_every_family_is_let_through(family):
    rows = [{**row(1, 1), "prompt_ids": [VOCABULARY - 1]}]
    refuse_beyond(rows, tiny_model(family))
    with pytest.raises(ValueError, match=f"the token id {VOCABULARY} is beyond"):
        refuse_beyond([{**row(1, 1), "response_ids": [[VOCABULARY]]}], tiny_model(family))


def test_a_model_with_adapters_on_its_ends_has_the_same_limits():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["embed_tokens", "lm_head"], r=2))
    assert vocabulary_size(model) == VOCABULARY


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_bounds_the_tokens_of_a_row_exactly(name):
    model = model_of(name)
    limit = position_table(model)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))
    refuse_beyond([row(3, limit - 3)], model)
    with pytest.raises(
        ValueError, match=rf"row 1 \(counted from 0\) has {limit + 1} tokens.* has {limit} positions. Set"
    ):
        refuse_beyond([row(1, 1), row(3, 1, limit - 2)], model)


def test_rotary_positions_have_no_end_and_rows_beyond_those_of_the_training_are_warned_of(caplog):
    model = tiny_model()
    assert position_table(model) is None
    with caplog.at_level(logging.WARNING):
        refuse_beyond([row(1, 60), row(1, 63)], model)
        assert caplog.text == ""
        refuse_beyond([row(1, 60), row(1, 64)], model)
    assert "1 of 2 rows are longer than the 64 positions that the model was made for" in caplog.text


def test_a_stream_and_no_rows_are_not_looked_at():
    refuse_beyond([], tiny_model())
    refuse_beyond(datasets.Dataset.from_list(tiny_rows(2)).to_iterable_dataset(), tiny_model())


def test_padding_that_the_model_has_no_row_for_is_replaced(caplog, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    keep_padding_inside(tokenizer, model)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token(tokenizer, model) == model.config.pad_token_id
    keep_padding_inside(tokenizer, model)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 3)
    assert "'[PAD]' has the id" in caplog.text


@pytest.mark.parametrize("pad", [-1, VOCABULARY])
def test_a_config_with_padding_that_is_no_token_pads_with_one(pad):
    model = tiny_model()
    model.config.pad_token_id = pad
    assert pad_token(None, model) == 0
