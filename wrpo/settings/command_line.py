"""A command's settings: dataclass fields from flags, from words and from a YAML file.

    wrpo COMMAND [CONFIG.yaml] WORDS ... [--field value ...]

What stands on the command line wins over the file. A value means the same in either: `3e-7` (which YAML takes for text)
is a float where the field is one, `true` is a bool, `null` and `none` leave an optional number unset. Flags may be
written with hyphens or underscores. A name that no field has is an error that suggests the nearest, if one is near.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from .fields import SettingsError
from .parser import Parser
from .reading import Reading
from .yaml_file import read_mapping

YAML = (".yaml", ".yml")


def parse_settings(
    classes: tuple[type, ...],
    arguments: list[str],
    prog: str,
    description: str | None = None,
    *,
    words: tuple[str, ...] = (),
    config_is_first: bool = True,
    epilog: str | None = None,
) -> Any:
    """A tuple with one instance of each dataclass, from a command's arguments.

    Args:
        classes: dataclasses without a field in common.
        arguments: what stands behind the command's name.
        prog: the command, for messages.
        description: what `--help` says first; `epilog`, what it says last.
        words: fields whose flag can be left out, in the order of their words; a list takes all that are left.
        config_is_first: whether a first word that ends in .yaml or .yml is the settings file. `--config` always is.

    Raises:
        SettingsError: an unknown name, a value of the wrong type, a missing field, a file that is not YAML, or values
            that a dataclass itself refuses.
        FileNotFoundError: no such YAML file.
    """
    parser = Parser(classes, prog, description=description, epilog=epilog)
    parser.usage = _usage(prog, words, parser.readings, config_is_first)
    parser.groups["files"].add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings file with the same fields as the flags, which win." + " Also the first word." * config_is_first,
    )
    given, loose = parser.read(arguments)
    config = _take_config(given.pop("config", None), loose, config_is_first)
    in_file = parser.read_mapping(read_mapping(config), config) if config is not None else {}
    values = in_file | given | _fields_of_words(loose, given, words, parser.readings)
    return tuple(_build(cls, values, "Give it as --{0}, or in the settings file.") for cls in classes)


def settings_from(cls: type, content: dict, place: str, *, hides_values: bool = False) -> Any:
    """One instance of a dataclass from a mapping of a YAML file, read as `parse_settings` reads a whole file.

    Args:
        place: where the mapping stands, for messages.
        hides_values: a value that cannot be read is not repeated: it may be a key in the wrong place.

    Raises:
        SettingsError: as `parse_settings`; the message begins with `place`.
    """
    values = Parser((cls,), place, hides_values=hides_values).read_mapping(content, place)
    try:
        return _build(cls, values, "Fill it in.")
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error


def describe_fields(cls: type) -> str:
    """One paragraph a field of a settings dataclass: name, default and help, for the end of a command's --help."""
    lines = []
    for field in dataclasses.fields(cls):
        default = field.default
        shown = "" if default in (dataclasses.MISSING, None, "") or "\n" in str(default) else f" [{default}]"
        text = f"{field.name}{shown}: {field.metadata.get('help', '')}"
        lines += textwrap.wrap(text, width=110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _usage(prog: str, words: tuple[str, ...], readings: dict[str, Reading], config_is_first: bool) -> str:
    shown = [f"[{name.upper()}{' ...' if readings[name].is_only_list else ''}]" for name in words]
    return " ".join([prog, *(["[CONFIG.yaml]"] if config_is_first else []), *shown, "[--field value ...]"])


def _take_config(named: str | None, loose: list[str], is_first: bool) -> str | None:
    """The settings file, taken out of the words where it is the first."""
    if not (is_first and loose and loose[0].endswith(YAML)):
        return named
    first = loose.pop(0)
    if named is not None:
        raise SettingsError(f"config: expected one settings file, got {named} and {first}")
    return first


def _fields_of_words(
    loose: list[str], given: dict[str, Any], words: tuple[str, ...], readings: dict[str, Reading]
) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name in words:
        if not loose:
            break
        if name in given:
            raise SettingsError(f"{name}: given as --{name}, and again as the word {loose[0]!r}; keep one")
        if readings[name].is_only_list:
            named[name], loose = loose, []
        else:
            named[name], loose = loose[0], loose[1:]
    if loose:
        raise SettingsError(f"expected --field value, got {loose[0]!r}")
    return named


def _build(cls: type, values: dict[str, Any], how: str) -> Any:
    own = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
    for field in dataclasses.fields(cls):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.init and not has_default and field.name not in own:
            raise SettingsError(f"{field.name}: expected a value, got none. {how.format(field.name)}")
    try:
        return cls(**own)
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(str(error)) from error
