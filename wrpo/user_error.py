"""Errors as their reader meets them: one line, without a traceback, of what the user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in data, settings or surroundings, not in the program; the message says what to do."""


def in_one_line(error: BaseException, longest: int = 200) -> str:
    """An error's kind and words, for a message; `longest` is in characters of the words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:longest]}"
