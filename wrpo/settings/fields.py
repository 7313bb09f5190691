"""What a setting says about itself, and what it may be.

alpha: float = knob(0.1, "Share of the sources. Default: 0.1 (paper).", group="loss")
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from wrpo.user_error import UserError

REQUIRED: Any = dataclasses.MISSING  # as a default: there is none
GROUPS = (
    "files",
    "model",
    "data",
    "asking",
    "scorer",
    "reward model",
    "choice",
    "limits",
    "comparison",
    "triples",
    "training",
    "loss",
    "reference",
    "speed",
    "logging",
)  # of `--help`, in its order


class SettingsError(UserError):
    """A setting that the user can put right."""


def knob(default: Any, text: str, *, group: str | None = None, **options: Any) -> Any:
    """A dataclass field that the command line, YAML files and the documentation can read.

    Args:
        default: its value where nobody sets it, or `REQUIRED`. A list is copied for each instance.
        text: what it means, its unit and, where its value does not say it, its default.
        group: of `GROUPS`; None for a field of a file that no flag sets.
        **options: of `ArgumentParser.add_argument`, e.g. `metavar`; `aliases` are further flags, e.g. `["-o"]`.
    """
    if group not in (None, *GROUPS):
        raise ValueError(f"group: expected one of {', '.join(GROUPS)}, got {group!r}")
    metadata = {"help": text, **({"group": group} if group else {}), **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def types_of_fields(settings_class: type) -> dict[str, Any]:
    """The type of each field, as it is meant and not as it is written. Kept: of `WRPOConfig` they take 8 ms."""
    return get_type_hints(settings_class)


def check_range(
    settings: Any,
    *names: str,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse fields that are no finite number from `low` to `high`, without an end that is open. A field of type int
    holds a whole number; None passes where the type allows it.

    Raises:
        ValueError: with the field, what was expected and what came.
    """
    hints = types_of_fields(settings.__class__)
    for name in names:
        value, types = getattr(settings, name), get_args(hints[name]) or (hints[name],)
        if value is None and NoneType in types:
            continue
        is_whole = float not in types
        # Compared, not converted: an integer may be too large for a float. NaN fails the comparison. True is an int.
        is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
        is_inside = is_number and abs(value) <= sys.float_info.max and low <= value <= high
        if not is_inside or (open_low and value == low) or (open_high and value == high):
            kind = "a whole number" if is_whole else "a finite number"
            bounds = [f" {'>' if open_low else '>='} {_short(low)}"] if low > -math.inf else []
            bounds += [f" {'<' if open_high else '<='} {_short(high)}"] if high < math.inf else []
            raise ValueError(f"{name}: expected {kind}{' and'.join(bounds)}, got {value!r}")


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_choices(settings: Any) -> None:
    """Raises ValueError where a field whose type is a `Literal`, or a value in a list of them, is not one of its
    choices, nor None where it may be.
    """
    for name, hint in types_of_fields(settings.__class__).items():
        value, parts = getattr(settings, name), (hint, *get_args(hint))
        if (choices := choices_of(hint)) and not (value is None and NoneType in parts):
            is_list = isinstance(value, list) and any(get_origin(part) is list for part in parts)
            for one in value if is_list else [value]:
                check_choice(name, one, choices)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError where the value of a field is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def refuse_idle(settings: Any, is_asked: bool, by: str, *names: str) -> None:
    """Refuse fields that were set though nothing reads them.

    Args:
        is_asked: whether something does.
        by: what would.

    Raises:
        SettingsError: one of the fields has not its default.
    """
    if is_asked:
        return
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in names:
        field, value = fields[name], getattr(settings, name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            raise SettingsError(f"{name} is for {by}; {value!r} would change nothing. Leave it out")


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Those of a `Literal`, of a list of one, and of either or None, each once; none where any text will do."""
    parts = get_args(hint)
    if get_origin(hint) is Literal or str in parts:
        return () if str in parts else parts
    return tuple(dict.fromkeys(choice for part in parts for choice in choices_of(part)))
