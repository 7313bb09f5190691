"""Flags of a command: mistakes are one line, and a mistyped flag is answered with the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from typing import NoReturn

from wrpo.user_error import UserError


class Flags(ArgumentParser):
    """An `ArgumentParser` that raises `UserError` and does not know abbreviations."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def read(self, arguments: list[str]) -> Namespace:
        """Unknown flags first: argparse would rather speak of what a mistyped one leaves open."""
        known = self._option_string_actions
        for argument in arguments:
            name = argument.split("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "--help lists them"
                raise UserError(f"no flag {name}; {hint}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def describe_fields(cls: type) -> str:
    """One paragraph a field of a settings dataclass: name, default and help, for the end of a command's --help."""
    lines = []
    for field in dataclasses.fields(cls):
        default = field.default
        shown = "" if default in (dataclasses.MISSING, None, "") or "\n" in str(default) else f" [{default}]"
        text = f"{field.name}{shown}: {field.metadata.get('help', '')}"
        lines += textwrap.wrap(text, width=110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def whole_number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected a number, got {text!r}")
    return value
