"""The fields of dataclasses as flags: `HfArgumentParser`, in groups and with mistakes that name field, wish and value.

A field is read by one function, whether its value comes as a flag or out of a mapping of a YAML file.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
    _ArgumentGroup,
    _StoreFalseAction,
)
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import zip_longest
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from wrpo.spelling import nearest

from .fields import GROUPS, SettingsError

INHERITED = "other fields of transformers.TrainingArguments"  # whose metadata name no group
WORDS_FOR: dict[Any, str] = {int: "a whole number", float: "a number", string_to_bool: "true or false"}


class Parser(HfArgumentParser):
    """Gives the fields that are set, and no defaults.

    Args:
        classes: dataclasses without a field in common.
        prog: the command, or the place in a file.
        hides_values: a value that cannot be read is not repeated: it may be a key in the wrong place.
        **options: of `ArgumentParser`.

    Attributes:
        hints: field -> its type.
    """

    def __init__(self, classes: tuple[type, ...], prog: str, *, hides_values: bool = False, **options: Any):
        super().__init__(classes, prog=prog, formatter_class=_Help, allow_abbrev=False, exit_on_error=False, **options)
        self.hints = {name: hint for cls in classes for name, hint in _hints(cls).items()}
        self._fields: dict[str, Action] = {}
        for action in [action for action in self._actions if action.dest in self.hints]:
            self._fields.setdefault(action.dest, action)
            action.help = _help(action)
            action.type = _reader(action, self.hints[action.dest], hides_values)
            action.default, action.required = SUPPRESS, False

    def add_argument(self, *names: str, group: str = INHERITED, **options: Any) -> Any:
        """`HfArgumentParser` hands on the metadata of a field, and so its group."""
        if "--help" in names:  # by ArgumentParser itself, before there are groups
            return super().add_argument(*names, **options)
        return self._groups[group].add_argument(*names, **options)

    @cached_property
    def _groups(self) -> dict[str, _ArgumentGroup]:
        return {title: self.add_argument_group(title) for title in (*GROUPS, INHERITED)}

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)

    def read(self, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
        """(fields that flags set, the words that belong to no flag)."""
        spelt = [_underscored(argument) for argument in arguments]
        for argument in spelt:  # before argparse looks, which would rather speak of what a mistyped flag leaves open
            if argument.startswith("--") and argument.split("=")[0] not in ("--", *self._option_string_actions):
                raise SettingsError(self._no_such(argument))
        try:
            given, loose = self.parse_known_args([*self._with_values(spelt)])
        except ArgumentError as error:
            raise SettingsError(f"{(error.argument_name or '').split('/')[0].lstrip('-')}: {error.message}") from error
        for word in loose:
            if word.startswith("-") and word not in ("-", "--"):
                raise SettingsError(self._no_such(word))
        return vars(given), [word for word in loose if word != "--"]

    def read_mapping(self, content: dict, place: str) -> dict[str, Any]:
        """The fields that a mapping sets, each read as its flag would be; `place` is where it stands, for messages."""
        values = {}
        for name, value in content.items():
            if name not in self.hints:
                raise SettingsError(f"{place}: {self._no_such(str(name))}")
            try:
                values[name] = self._value(self._fields[name], self.hints[name], value)
            except ArgumentTypeError as error:
                raise SettingsError(f"{place}: {name}: {error}") from None
        return values

    def _value(self, action: Action, hint: Any, value: Any) -> Any:
        read: Callable[[str], Any] = action.type  # type: ignore[assignment]  # made by `_reader`
        if value is None:
            if type(None) not in get_args(hint):
                raise ArgumentTypeError("expected a value, got null")
            return None
        if isinstance(value, list):
            if not takes_several(hint):
                raise ArgumentTypeError(f"expected one value, got {len(value)} in a list")
            return [read(_text(one)) for one in value]
        return [read(_text(value))] if action.nargs == "+" else read(_text(value))

    def _with_values(self, arguments: list[str]) -> Iterator[str]:
        """The value of a bool may be left out, and the word behind it is then not its value."""
        for argument, following in zip_longest(arguments, arguments[1:]):
            action = self._option_string_actions.get(argument)
            is_bare = action is not None and action.const is True and not _is_truth(following)
            yield f"{argument}=true" if is_bare else argument

    def _no_such(self, name: str) -> str:
        bare = name.lstrip("-").split("=")[0]
        near = nearest(bare, {flag.lstrip("-") for flag in map(_underscored, self._option_string_actions)})
        return f"no setting named {bare!r}; " + (f"did you mean {near!r}?" if near else "--help lists them")


class _Help(RawDescriptionHelpFormatter):
    """One spelling of each flag."""

    def _format_action_invocation(self, action: Action) -> str:
        flags = sorted({_underscored(flag) for flag in action.option_strings}, reverse=True)  # -o before --output
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(flags)} {value}".strip()


def _help(action: Action) -> str:
    if isinstance(action, _StoreFalseAction):
        return f"The same as --{action.dest} false."
    text = action.help or ""
    if action.required:
        return f"{text} Required."
    return text if action.default in (None, []) or "Default" in text else f"{text} Default: {action.default}."


def _reader(action: Action, hint: Any, hides_values: bool) -> Callable[[str], Any]:
    """From the text of a value to the value."""
    parse: Any = action.type or str
    expected = WORDS_FOR.get(parse, getattr(parse, "__name__", "another value"))
    if action.choices is not None:
        expected = f"one of {', '.join(map(str, action.choices))}"
    allowed = get_args(hint)
    may_be_none = type(None) in allowed and str not in allowed  # `--max_length none`, where it cannot be a value

    def read(text: str) -> Any:
        if may_be_none and text.lower() in ("none", "null"):
            return None
        try:
            value = parse(text)
            is_allowed = action.choices is None or value in action.choices
        except (ArgumentTypeError, TypeError, ValueError):
            is_allowed = False
        if not is_allowed:
            raise ArgumentTypeError(f"expected {expected}" + ("" if hides_values else f", got {text!r}"))
        return value

    return read


def _text(value: Any) -> str:
    try:
        return json.dumps(value) if isinstance(value, dict) else str(value)
    except (TypeError, ValueError, RecursionError):  # a date, or itself
        raise ArgumentTypeError("expected a mapping that JSON can hold; put dates in quotes") from None


def takes_several(hint: Any) -> bool:
    """Whether a field of this type may be a list."""
    return any(part is list or get_origin(part) is list for part in (hint, *get_args(hint)))


def _is_truth(text: str | None) -> bool:
    try:
        return isinstance(string_to_bool(text), bool)
    except (ArgumentTypeError, AttributeError):
        return False


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
