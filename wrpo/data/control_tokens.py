"""Special tokens of a tokenizer that stand in text as words: whoever tokenises the text reads them as tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """The special tokens of one tokenizer, e.g. `<|im_end|>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.all = tuple(token for token in special if token)
        self._beginnings = {token[:2] for token in self.all}  # few, where tokens may be thousands

    def within(self, text: str) -> list[str]:
        """Those that stand in the text."""
        if not any(beginning in text for beginning in self._beginnings):
            return []
        return sorted(token for token in self.all if token in text)

    def first(self, text: str) -> str | None:
        """The one that comes first in the text."""
        return min(self.within(text), key=lambda token: (text.index(token), -len(token)), default=None)


def until_first(tokens: Collection[str], text: str) -> str:
    """The text before the first of the tokens in it; all of it where there is none."""
    return text[: min((text.index(token) for token in tokens if token in text), default=len(text))]
