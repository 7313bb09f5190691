"""Settings of a run: dataclass fields, filled from a YAML file and from the command line, which wins.

fields.py        what a field says about itself, and how far a number may go
model.py         which model, for every command that loads one to train it
layout.py        where the tokens of its batches stand
data.py          which rows
yaml_file.py     a YAML file, read once for all commands
command_line.py  a command's fields from flags, words and the file (imports transformers, so it is not imported here)
"""

from __future__ import annotations

from .command_line import describe_fields, parse_settings, settings_from
from .data import DataSettings
from .fields import (
    GROUPS,
    REQUIRED,
    SettingsError,
    check_choice,
    check_choices,
    check_range,
    choices_of,
    knob,
    refuse_idle,
)
from .layout import LAYOUT, LayoutName
from .model import ModelSettings

__all__ = [
    "GROUPS",
    "LAYOUT",
    "REQUIRED",
    "DataSettings",
    "LayoutName",
    "ModelSettings",
    "SettingsError",
    "check_choice",
    "check_choices",
    "check_range",
    "choices_of",
    "describe_fields",
    "knob",
    "parse_settings",
    "refuse_idle",
    "settings_from",
]
