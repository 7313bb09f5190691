"""A value's text is read by the type of its field: one reading for flags and files."""

from __future__ import annotations

import enum
from typing import Literal, get_type_hints

import pytest
from transformers import TrainingArguments

from wrpo.settings.reading import Unreadable, reading_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


READINGS = {
    "text": (str, "none", "none"),
    "optional text": (str | None, "none", "none"),
    "a whole number": (int, "-3", -3),
    "a float without a point": (float, "3e-7", 3e-7),
    "no number": (float | None, "None", None),
    "no whole number": (int | None, "null", None),
    "yes": (bool, "Yes", True),
    "off": (bool | None, "off", False),
    "no bool": (bool | None, "none", None),
    "a literal": (Literal["a", "b"], "b", "b"),
    "a member of an enum, by its value": (Colour, "blue", "blue"),
    "an enum or text": (Colour | str, "red", "red"),
    "one of a list": (list[int], "7", 7),
    "one of an optional list": (list[str] | None, "x", "x"),
    "text or a list": (str | list[str] | None, "x", "x"),
    "a mapping": (dict[str, bool] | None, '{"a": true}', {"a": True}),
    "a mapping or text": (dict | str | None, '{"a": true}', '{"a": true}'),
    "true, where text is a value too": (str | bool, "true", True),
    "text, where true is a value too": (str | bool, "all", "all"),
}


@pytest.mark.parametrize(("hint", "text", "value"), READINGS.values(), ids=READINGS)
def test_a_text_becomes_the_value_of_its_type(hint, text, value):
    read = reading_of(hint)(text)
    assert read == value and type(read) is type(value)


UNREADABLE = {
    "text for a number": (float, "much", "a number"),
    "a fraction for a whole number": (int, "1.5", "a whole number"),
    "no number where there must be one": (int, "none", "a whole number"),
    "text for a bool": (bool, "maybe", "true or false"),
    "a choice that is none": (Literal["a", "b"], "c", "one of a, b"),
    "a colour that is none": (Colour | str, "green", "one of red, blue"),
    "a list for a mapping": (dict | None, "[1]", "a mapping"),
    "brackets in brackets": (dict | None, "[" * 100_000, "a mapping"),
    "an object": (range | None, "3", "nothing: only a program can set it"),
}


@pytest.mark.parametrize(("hint", "text", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_text_of_another_type_says_what_was_expected(hint, text, expected):
    with pytest.raises(Unreadable, match=f"^expected {expected}$"):
        reading_of(hint)(text)


def test_every_field_of_transformers_can_be_set_but_the_one_that_is_an_object():
    closed = [
        name for name, hint in get_type_hints(TrainingArguments).items() if "program" in reading_of(hint).expected
    ]
    assert closed in ([], ["parallelism_config"])
