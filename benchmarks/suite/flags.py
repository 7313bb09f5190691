"""Flags of a benchmark: mistakes are one line, and a mistyped flag is answered with the nearest one."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from typing import NoReturn

from wrpo.spelling import nearest
from wrpo.user_error import UserError


class Flags(ArgumentParser):
    """An `ArgumentParser` that raises `UserError` and does not know abbreviations."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def read(self, arguments: list[str]) -> Namespace:
        """Unknown flags first: argparse would rather speak of what a mistyped one leaves open."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for argument in arguments:
            name = argument.split("=")[0]
            if name.startswith("--") and name != "--" and name not in known:
                near = nearest(name[2:], [flag[2:] for flag in known])
                raise UserError(f"no flag {name}; " + (f"did you mean --{near}?" if near else "--help lists them"))
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


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
