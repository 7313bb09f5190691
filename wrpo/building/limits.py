"""Which prompts and answers are too long, too short, cut, or say what a better answer has said."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from wrpo.rows.candidate import Answer
from wrpo.rows.messages import Asked, message_text
from wrpo.user_error import UserError

from .settings import BuildSettings

WAS_CUT = "cut before the model had ended it"


class Limits:
    """The length limits of the settings. The tokenizer is loaded here, if one is named.

    Raises:
        UserError: no tokenizer to load there.
    """

    def __init__(self, settings: BuildSettings):
        self._settings = settings
        self._tokenizer = None if settings.tokenizer is None else _load_tokenizer(settings.tokenizer)

    def refuse_prompt(self, asked: Asked) -> str | None:
        """Why a prompt is too long, or None."""
        tools = [json.dumps(tool, ensure_ascii=False) for tool in asked.tools or []]
        texts = [*map(message_text, asked.messages), *tools]
        most, most_tokens = self._settings.max_prompt_chars, self._settings.max_prompt_tokens
        if most is not None and sum(map(len, texts)) > most:
            return f"prompt longer than {most} characters"
        if most_tokens is not None and sum(self._count_tokens(texts)) > most_tokens:
            return f"prompt longer than {most_tokens} tokens"
        return None

    def keep(self, answers: list[Answer], dropped: Counter[str]) -> list[Answer]:
        """The answers within the limits, in their order; the others are counted with their reason."""
        kept = []
        for answer in answers:
            reason = self._refuse_cut(answer) or self._refuse_chars(answer.response)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(answer)
        most = self._settings.max_tokens
        if most is None or not kept:
            return kept
        counts = self._count_tokens([answer.response for answer in kept])
        dropped[f"longer than {most} tokens"] += sum(count > most for count in counts)
        return [answer for answer, count in zip(kept, counts, strict=True) if count <= most]

    def _refuse_cut(self, answer: Answer) -> str | None:
        return WAS_CUT if answer.cut and self._settings.cut_answers == "drop" else None

    def _refuse_chars(self, text: str) -> str | None:
        length = len(text.strip())
        if length == 0:
            return "empty"
        if length < self._settings.min_chars:
            return f"shorter than {self._settings.min_chars} characters"
        if self._settings.max_chars is not None and length > self._settings.max_chars:
            return f"longer than {self._settings.max_chars} characters"
        return None

    def _count_tokens(self, texts: list[str]) -> list[int]:
        assert self._tokenizer is not None  # the settings saw to it
        # verbose=False: no warning of texts longer than the model's context; they are what is looked for.
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer {name!r}: {error}") from error


def distinct(answers: list[Answer], dropped: Counter[str]) -> list[Answer]:
    """The first, and so the best, answer of each text; spaces around a text make no other."""
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(answer.response.strip(), answer)
    if len(first) < len(answers):
        dropped["same text as a better answer"] += len(answers) - len(first)
    return list(first.values())
