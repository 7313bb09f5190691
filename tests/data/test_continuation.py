"""Prompt and response ids decode to prompt and response, whatever the tokenizer puts before a text of its own."""

from __future__ import annotations

import random

import pytest
from tiny_tokenizer import CHATML, spaced_tokenizer, tiny_tokenizer

from wrpo.data import load_examples, tokenize_examples
from wrpo.data.continuation import continued_text, response_ids, token_ids
from wrpo.pretrained import plain_template
from wrpo.rows.errors import DataError

PIECES = ["five", " two", "\n", "\n\n", " ", ", of", " course", ".", "?", " +", " 2", "world", "(x)", "and", " sum"]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def ids_of_both(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    start, whole = token_ids(tokenizer, [prompt, prompt + response])
    return start, response_ids(tokenizer, start, whole, response, "response")


SPACING = {
    f"{kind}, {scheme}": spaced_tokenizer(kind, scheme=scheme)
    for kind in ("bpe", "unigram")
    for scheme in ("first", "always")
}
TOKENIZERS = {"bytes": tiny_tokenizer()} | SPACING


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_ids_of_prompt_and_response_decode_to_their_text_wherever_it_is_cut(tokenizer):
    rng = random.Random(0)
    merged = 0
    for _ in range(300):
        text = rng.choice("wa5(") + "".join(rng.choices(PIECES, k=rng.randint(2, 12))) + rng.choice(["", "<|im_end|>"])
        cut = rng.randint(1, len(text.removesuffix("<|im_end|>")) - 1)
        start, after = ids_of_both(tokenizer, text[:cut], text[cut:])
        (both,) = token_ids(tokenizer, [text])
        assert decoded(tokenizer, start + after) == decoded(tokenizer, both)
        merged += both[: len(start)] != start
    assert merged > 20, "without merges at the boundary there is nothing to prove"


def test_a_response_gets_no_space_that_is_not_in_it():
    tokenizer = spaced_tokenizer("bpe")
    tokenizer.chat_template = plain_template(tokenizer)
    row = {"prompt": "what is the su", "chosen": ["m of", "m"], "rejected": "n"}
    (tokens,) = tokenize_examples(load_examples([row]), tokenizer)
    assert tokenizer.decode(tokens["prompt_ids"]) == "what is the su"
    texts = [tokenizer.decode(tokens["prompt_ids"] + ids, skip_special_tokens=True) for ids in tokens["response_ids"]]
    assert texts == ["what is the sum of", "what is the sum", "what is the sun"]


def test_the_ids_of_the_whole_are_kept_where_they_begin_with_the_prompts():
    tokenizer = tiny_tokenizer(CHATML)
    prompt, whole = [1, 2], [1, 2, 3, 4]
    assert response_ids(tokenizer, prompt, whole, "anything", "response") == [3, 4]


def test_a_response_that_no_ids_go_on_to_is_refused():
    tokenizer = tiny_tokenizer(CHATML)
    prompt, whole = token_ids(tokenizer, ["what", "which five"])
    with pytest.raises(DataError, match="field 'response 1': expected ids of prompt and response that decode to both"):
        response_ids(tokenizer, prompt, whole, " five", "response 1")


@pytest.mark.parametrize("tokenizer", SPACING.values(), ids=SPACING)
def test_what_was_generated_reads_as_it_goes_on_from_its_prompt(tokenizer):
    prompt, spaced, joined = token_ids(tokenizer, ["what is the su", "what is the su five</s>", "m of"])
    assert continued_text(tokenizer, prompt, spaced[len(prompt) :]) == " five"
    assert continued_text(tokenizer, prompt, joined) == " m of", "the ids begin with a space"
    assert continued_text(tokenizer, prompt, ids_of_both(tokenizer, "what is the su", "m of")[1]) == "m of"
