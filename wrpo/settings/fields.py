"""What a setting says about itself, and what it may be.

alpha: float = knob(0.1, "Share of the sources. Default: 0.1 (paper).", group="loss")
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

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


def check_range(
    settings: Any,
    *names: str,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse fields that are no finite number from `low` to `high`, without an end that is open; None where it may be.

    Raises:
        ValueError: with the field, what was expected and what came.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None and _may_be_none(settings, name):
            continue
        # Compared, not converted: an integer may be too large for a float. NaN fails the comparison.
        is_number = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        is_inside = is_number and low <= value <= high and not (open_low and value == low)
        if not is_inside or (open_high and value == high):
            bounds = [f" {'>' if open_low else '>='} {_short(low)}"] if low > -math.inf else []
            bounds += [f" {'<' if open_high else '<='} {_short(high)}"] if high < math.inf else []
            raise ValueError(f"{name}: expected a finite number{' and'.join(bounds)}, got {value!r}")


def _may_be_none(settings: Any, name: str) -> bool:
    return NoneType in get_args(get_type_hints(type(settings))[name])


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def check_choice(settings: Any, name: str, choices: Collection[str]) -> None:
    """Raises ValueError where a field, or a value in its list, is not one of `choices`, nor None where it may be."""
    value = getattr(settings, name)
    if value is None and _may_be_none(settings, name):
        return
    hint = get_type_hints(type(settings))[name]
    is_list = any(get_origin(part) is list for part in (hint, *get_args(hint)))
    for one in value if is_list and isinstance(value, list) else [value]:
        if one not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {one!r}")
