"""The fields of dataclasses as flags in groups; mistakes name the field, what was expected and what came."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, ArgumentError, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from wrpo.spelling import nearest

from .fields import GROUPS, SettingsError, types_of_fields
from .reading import FALSE, NONE, TRUE, Reading, Unreadable, reading_of

NO_WORD = re.compile(r"^-|[./\\*?]")  # another flag, or the name of a file or a pattern of names
INHERITED = "other fields of transformers.TrainingArguments"  # whose metadata name no group


class Parser(ArgumentParser):
    """Gives the fields that are set, and no defaults.

    Args:
        classes: dataclasses without a field in common.
        prog: the command, or the place in a file.
        hides_values: a value that cannot be read is not repeated: it may be a key in the wrong place.
        **options: of `ArgumentParser`.

    Attributes:
        readings: field -> how its values are read.
    """

    def __init__(self, classes: tuple[type, ...], prog: str, *, hides_values: bool = False, **options: Any):
        super().__init__(
            prog=prog,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
            argument_default=SUPPRESS,
            **options,
        )
        self.groups = {title: self.add_argument_group(title) for title in (*GROUPS, INHERITED)}
        self.readings: dict[str, Reading] = {}
        self._hides_values = hides_values
        for cls in classes:
            hints = types_of_fields(cls)
            for field in fields(cls):
                if field.init:
                    self.readings[field.name] = reading_of(hints[field.name], field.metadata.get("choices"))
                    self._add(field, self.readings[field.name])

    def _add(self, field: Field, reading: Reading) -> None:
        """`--field`, `--no_field` where it is true unless somebody says no, and its other flags."""
        metadata = {name: value for name, value in field.metadata.items() if name != "choices"}  # the reading has them
        group = self.groups[metadata.pop("group", INHERITED)]
        flags = [*metadata.pop("aliases", []), f"--{field.name}"]
        options: dict[str, Any] = {"dest": field.name, "type": partial(self._read, reading), "help": _help(field)}
        if reading.choices:
            options["metavar"] = f"{{{','.join(reading.choices)}}}"
        if reading.is_only_list:
            options["nargs"] = "+"
        if reading.is_bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        group.add_argument(*flags, **{**metadata, **options})
        if field.default is True:
            text = f"The same as --{field.name} false."
            group.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", help=text)

    def _read(self, reading: Reading, text: str) -> Any:
        try:
            return reading(text)
        except Unreadable as error:
            raise ArgumentTypeError(f"{error}" + ("" if self._hides_values else f", got {text!r}")) from None

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)

    def read(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        """(fields that flags set, the words that belong to no flag)."""
        spelt = [_underscored(argument) for argument in arguments]
        for argument in spelt:  # before argparse looks, which would rather speak of what a mistyped flag leaves open
            if argument.startswith("--") and argument.split("=")[0] not in ("--", *self._option_string_actions):
                raise SettingsError(self._no_such(argument))
        try:
            given, loose = self.parse_known_args([*self._with_values([*self._with_commas(spelt)])])
        except ArgumentError as error:
            name, is_bare = (error.argument_name or "").split("--")[-1], error.message.endswith("one argument")
            raise SettingsError(f"{name}: {'expected a value, got none' if is_bare else error.message}") from error
        for word in loose:
            if word.startswith("-") and word not in ("-", "--"):
                raise SettingsError(self._no_such(word))
        return vars(given), [word for word in loose if word != "--"]

    def read_mapping(self, content: dict, place: str) -> dict[str, Any]:
        """The fields that a mapping sets, each read as its flag would be; `place` is where it stands, for messages."""
        values = {}
        for name, value in content.items():
            if name not in self.readings:
                raise SettingsError(f"{place}: {self._no_such(str(name))}")
            try:
                values[name] = self._value(self.readings[name], value)
            except ArgumentTypeError as error:
                raise SettingsError(f"{place}: {name}: {error}") from None
        return values

    def _value(self, reading: Reading, value: Any) -> Any:
        if value is None:
            if not reading.may_be_none:
                raise ArgumentTypeError("expected a value, got null")
            return None
        if isinstance(value, list):
            if not reading.is_list:
                raise ArgumentTypeError(f"expected one value, got {len(value)} in a list")
            read = [self._read(reading, _text(one)) for one in value]
            return [one for part in read for one in (part if isinstance(part, list) else [part])]
        one = self._read(reading, _text(value))
        return [one] if reading.is_only_list else one

    def _with_values(self, arguments: list[str]) -> Iterator[str]:
        """The value of a bool may be left out, and a word behind it is then not its value but a file's name."""
        for argument, following in zip_longest(arguments, arguments[1:]):
            action = self._option_string_actions.get(argument)
            if action is None or action.nargs != "?":
                yield argument
                continue
            values = (*TRUE, *FALSE, *(NONE if self.readings[action.dest].reads_none else ()))
            is_bare = (following or "").lower() not in values
            if is_bare and following and not (NO_WORD.search(following) or Path(following).exists()):
                raise SettingsError(
                    f"{action.dest}: expected true or false, got {following!r}, which is no file either"
                )
            yield f"{argument}=true" if is_bare else argument

    def _with_commas(self, arguments: list[str]) -> Iterator[str]:
        """Choices behind a flag that takes several, in one word; what stands behind them is a file's name."""
        words = [*arguments]
        while words:
            argument = words.pop(0)
            flag, equals, value = argument.partition("=")
            action = self._option_string_actions.get(flag)
            name = "" if action is None else action.dest
            reading = self.readings.get(name)
            if reading is None or not reading.is_one_or_several:
                yield argument
                continue
            taken = [value] if equals else []
            while words and set(_pieces(words[0])) <= set(reading.choices):
                taken += _pieces(words.pop(0))
            if taken and words and not (NO_WORD.search(words[0]) or Path(words[0]).exists()):
                got = f"got {words[0]!r}, which is no file either"
                raise SettingsError(f"{name}: expected {reading.expected}, {got}")
            yield f"{flag}={','.join(taken)}" if taken else argument

    def _no_such(self, name: str) -> str:
        bare = name.lstrip("-").split("=")[0]
        near = nearest(bare, {flag.removeprefix("--") for flag in self._option_string_actions})
        return f"no setting named {bare!r}; " + (f"did you mean {near!r}?" if near else "--help lists them")


def _pieces(text: str) -> list[str]:
    return text.strip(",").split(",")


def _help(field: Field) -> str:
    text = field.metadata.get("help", "")
    if field.default is field.default_factory is MISSING:
        return f"{text} Required."
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default in (None, []) or "Default" in text:
        return text
    return f"{text} Default: {getattr(default, 'value', default)}."  # of an Enum, its value


def _text(value: Any) -> str:
    try:
        return json.dumps(value) if isinstance(value, dict) else str(value)
    except (TypeError, ValueError, RecursionError):  # a date, or itself
        raise ArgumentTypeError("expected a mapping that JSON can hold; put dates in quotes") from None


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument
