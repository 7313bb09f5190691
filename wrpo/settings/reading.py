"""From the text of a value to the value, by the type of its field: the same for a flag and for a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

TRUE, FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
NONE = ("none", "null")


class Unreadable(Exception):
    """The value is not of the field's type; the message says what was expected."""


@dataclass(frozen=True)
class Reading:
    """How a field's values are read.

    Attributes:
        parse: from text to a value; raises ValueError, TypeError or KeyError.
        expected: what the text should be, for messages.
        choices: the values there are, where they are few.
        is_list: whether the field takes several values, or may.
        is_only_list: whether it takes nothing else.
        may_be_none: whether None is one of its values.
        reads_none: whether the text `none` is, where it cannot be anything else.
    """

    parse: Callable[[str], Any]
    expected: str
    choices: tuple[str, ...] = ()
    is_list: bool = False
    is_only_list: bool = False
    may_be_none: bool = False
    reads_none: bool = False

    def __call__(self, text: str) -> Any:
        if self.reads_none and text.lower() in NONE:
            return None
        if self.is_one_or_several and "," in text:
            return [self(one.strip()) for one in text.split(",")]
        try:
            return self.parse(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Unreadable(f"expected {self.expected}") from None

    @property
    def is_one_or_several(self) -> bool:
        """Whether one of the choices is a value, and so is a list of them, in text with commas."""
        return bool(self.choices) and self.is_list and not self.is_only_list

    @property
    def is_bool(self) -> bool:
        return self.parse is parse_bool


def reading_of(hint: Any, of_text: Sequence[str] | None = None) -> Reading:
    """How a field of this type is read: text, a number, a bool, a choice, a mapping, a list of these, or None too.

    of_text: the choices of a field whose type does not say them. Default: any text.
    """
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    others = [part for part in parts if part is not NoneType]
    lists = [part for part in others if get_origin(part) is list]
    is_only_list = len(lists) == len(others)
    of_one = [get_args(lists[0])[0]] if is_only_list else [part for part in others if part not in lists]
    parse, expected, choices = _of_one([Literal[tuple(of_text)]] if of_text else of_one)
    may_be_none = NoneType in parts
    return Reading(parse, expected, choices, bool(lists), is_only_list, may_be_none, may_be_none and str not in of_one)


def _of_one(types: list[Any]) -> tuple[Callable[[str], Any], str, tuple[str, ...]]:
    """(from text to one of these types, what the text should be, the choices that there are)."""
    enum = next((part for part in types if isinstance(part, type) and issubclass(part, Enum)), None)
    literals = [value for part in types if get_origin(part) is Literal for value in get_args(part)]
    choices = [member.value for member in enum] if enum else literals
    if enum or (choices and str not in types):
        shown = tuple(map(str, choices))
        return partial(_chosen, choices), f"one of {', '.join(shown)}", shown
    if str in types:
        return (parse_bool_or_text if bool in types or False in literals else str), "text", ()
    kinds = {get_origin(part) or part for part in types}
    for kind, (parse, expected) in KINDS.items():
        if kind in kinds:
            return parse, expected, ()
    return _refuse, "nothing: only a program can set it", ()


def parse_bool_or_text(text: str) -> bool | str:
    return parse_bool(text) if text.lower() in ("true", "false") else text


def parse_bool(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise ValueError(text)
    return text.lower() in TRUE


def parse_mapping(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(text)
    return value


def _chosen(choices: list[Any], text: str) -> Any:
    return {str(choice): choice for choice in choices}[text]


def _refuse(text: str) -> Any:
    raise TypeError(text)


KINDS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (parse_bool, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    dict: (parse_mapping, "a mapping"),
}
