"""The ids of a response behind its prompt, as the model sees them: generation goes on from the prompt's own ids.

They are those of the whole conversation, cut where the prompt's own end. Where the tokenizer would merge the last
character of the prompt with the first of the response (a response that starts with a newline, say) there is no such
place, and the response is tokenised by itself, because generation can never produce the merged token. Tokenizers as
SentencePiece's put a space before a text that is tokenised by itself; there it is tokenised behind a character that it
does not merge with, whose ids are cut off. Whichever way is taken, the ids decode to the text of the conversation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wrpo.rows.errors import DataError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE = ("", "\n", ".", ")", "0", "a")  # tried in this order


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of rendered text: special tokens are already written out in it, so none is added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def response_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], whole: list[int], response: str, field: str
) -> list[int]:
    """The ids of `response` after those of the prompt.

    Args:
        prompt, whole: ids of the prompt, and of the prompt and the response as one text.
        response: its text.

    Raises:
        DataError: no ids decode to the text of the conversation.
    """
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    text = _decoded(tokenizer, whole)
    for before in BEFORE:
        first, both = token_ids(tokenizer, [before, before + response])
        if both[: len(first)] == first and _decoded(tokenizer, prompt + both[len(first) :]) == text:
            return both[len(first) :]
    got = f"a tokenizer that cannot go on from a prompt to {shown(response)}"
    raise DataError("ids of prompt and response that decode to both", got, "Drop the row.", field=field)


def continued_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """What generated ids add to the prompt's text, without special tokens: decoded alone, a first space may vanish."""
    start = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(prompt + new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new, skip_special_tokens=True)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
