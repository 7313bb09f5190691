"""Settings of a run: dataclass fields, filled from a YAML file and from the command line, which wins.

Both are read by one argument parser, so a value means the same in either: `3e-7` (which YAML takes for text) is a float
where the field is one, `true` is a bool, `null` and `none` leave an optional number unset. A name that no field has is
an error that suggests the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
from argparse import Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter, _StoreFalseAction
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .user_error import UserError


class SettingsError(UserError):
    """A setting that the user can put right."""


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ModelSettings:
    """Which model is trained, and which part of it."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the target model and its tokenizer."})
    gguf_file: str | None = _knob(None, "GGUF file in that folder to take weights and tokenizer from.")
    torch_dtype: Literal["float32", "bfloat16", "float16", "auto"] = _knob(
        "float32",
        "Type of the weights in memory; auto: as saved. Full fine-tuning wants float32 (with bf16: true for speed): "
        "bfloat16 weights round the paper's small steps away. Under LoRA bfloat16 is fine.",
    )
    attn_implementation: str | None = _knob(None, "Attention of transformers: eager, sdpa, flash_attention_2.")
    chat_template_file: str | None = _knob(None, "Jinja file used instead of the tokenizer's chat template.")
    trust_remote_code: bool = _knob(False, "Run code that a hub repository carries.")
    lora_r: int = _knob(0, "Rank of LoRA adapters; 0: train all weights.")
    lora_alpha: float = _knob(16.0, "LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _knob(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, by name. Default: every linear layer."}
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise ValueError(f"lora_r must be a rank of at least 1, or 0 to train all weights, got {self.lora_r}")
        if not self.lora_r and self.lora_target_modules:
            raise ValueError(
                "lora_target_modules needs lora_r, the rank of the adapters; it is 0, which trains all weights"
            )
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be a finite number > 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if self.lora_r and find_spec("peft") is None:
            raise ValueError("lora_r needs the package peft: pip install 'wrpo[peft]'")


@dataclass
class DataSettings:
    """Which rows it is trained on."""

    train_file: str = field(
        metadata={
            "help": "Triples; wrpo sft also takes rows of prompt and response. .jsonl, .json, .parquet, a glob of "
            "them, or a folder of save_to_disk."
        }
    )
    eval_file: str | None = _knob(None, "Rows to evaluate on, every epoch unless eval_strategy says otherwise.")
    train_split: str = _knob("train", "Split of train_file, where it is a saved DatasetDict.")
    eval_split: str = _knob("test", "Split of eval_file, where it is a saved DatasetDict.")
    skip_bad_rows: bool = _knob(False, "Leave bad rows out and count them, instead of stopping at the first.")
    chat_template_kwargs: str | None = _knob(
        None, "Options of the chat template as a mapping (on the command line JSON: '{\"enable_thinking\": false}')."
    )
    tokenize_processes: int = _knob(1, "Processes that tokenise; one is enough for fast tokenizers.")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """One spelling of each flag, and its default once."""

    def _format_action_invocation(self, action: Action) -> str:
        spellings = {name.strip("-").replace("-", "_"): name for name in reversed(action.option_strings)}
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(reversed(spellings.values()))} {value}".strip()

    def _get_help_string(self, action: Action) -> str | None:
        if isinstance(action, _StoreFalseAction):
            return f"The same as --{action.dest} false."
        if action.default is None or "Default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(re.sub(r"/--[\w-]+", "", message))  # each flag in one of its two spellings


def parse_settings(
    classes: tuple[type, ...], arguments: list[str], prog: str, description: str | None = None
) -> tuple[Any, ...]:
    """One instance of each dataclass, from `[CONFIG.yaml] [--field value ...]`; `description` heads its --help.

    Raises:
        SettingsError: an unknown name, a value of the wrong type, a missing field, a file that is not YAML, or values
            that the dataclass itself refuses.
        FileNotFoundError: no such YAML file.
    """
    hints = {name: hint for cls in classes for name, hint in _fields(cls).items()}
    usage = f"{prog} [CONFIG.yaml] [--field value ...]"
    parser = _Parser(
        classes, prog=prog, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )
    _own_fields_first(parser, classes)
    _let_numbers_be_none(parser, hints)
    flags: list[str] = []
    if arguments and not arguments[0].startswith("-"):
        flags, unset = _from_yaml(Path(arguments[0]), hints)
        parser.set_defaults(**unset)
        arguments = arguments[1:]
    _refuse_unknown(arguments, parser, hints)
    values, stray = parser.parse_known_args([*flags, *arguments])
    if stray:
        raise SettingsError(f"expected --field value, got {stray[0]!r}")
    return tuple(_build(cls, values) for cls in classes)


def settings_from(cls: type, content: dict, place: str) -> Any:
    """One instance of a dataclass from a mapping of a YAML file, read as `parse_settings` reads a whole file.

    Raises:
        SettingsError: as `parse_settings`; the message begins with `place`.
    """
    hints = _fields(cls)
    flags, unset = _from_mapping(content, hints, place)
    parser = _Parser((cls,), prog=place, allow_abbrev=False)
    _let_numbers_be_none(parser, hints)
    parser.set_defaults(**unset)
    try:
        return _build(cls, parser.parse_args(flags))
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error


def _fields(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _build(cls: type, values: Namespace) -> Any:
    try:
        return cls(**{name: getattr(values, name) for name in _fields(cls)})
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(str(error)) from error


def _refuse_unknown(arguments: list[str], parser: HfArgumentParser, hints: dict[str, Any]) -> None:
    """Before argparse looks: it would rather speak of the required field that a mistyped name leaves open."""
    for argument in arguments:
        if argument.startswith("--") and argument.split("=")[0] not in parser._option_string_actions:
            raise SettingsError(_no_such(argument, hints))


def _no_such(name: str, known: Iterable[str]) -> str:
    """Names the nearest field: a typing error is the usual cause."""
    bare = name.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(bare, list(known), n=1, cutoff=0.5)
    return f"no setting named {bare!r}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists them")


def _own_fields_first(parser: HfArgumentParser, classes: tuple[type, ...]) -> None:
    """In --help; what a class inherits from transformers stands behind, in a group of its own."""
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__.startswith("wrpo.")}
    own = {name for base in bases for name in inspect.get_annotations(base)}
    fields = [action for action in parser._optionals._group_actions if action.dest != "help"]
    inherited = [action for action in fields if action.dest not in own]
    if inherited:
        group = parser.add_argument_group("fields of transformers.TrainingArguments")
        group._group_actions += inherited
        parser._optionals._group_actions = [a for a in parser._optionals._group_actions if a not in inherited]


def _let_numbers_be_none(parser: HfArgumentParser, hints: dict[str, Any]) -> None:
    """`--max_length none`: for optional numbers and bools, where it cannot be a value."""
    for action in parser._actions:
        parse = action.type
        allowed = get_args(hints.get(action.dest))
        if callable(parse) and type(None) in allowed and str not in allowed:
            action.type = _or_none(parse)


def _or_none(parse: Any) -> Any:
    def parse_or_none(text: str) -> Any:
        return None if text.lower() in ("none", "null") else parse(text)

    parse_or_none.__name__ = getattr(parse, "__name__", "value")  # argparse puts it into its message
    return parse_or_none


class UniqueFields(yaml.SafeLoader):
    """YAML takes the last of two fields with one name in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise SettingsError(f"{key.value} stands in line {lines[key.value]} and in line {line}; keep one")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def _from_yaml(path: Path, hints: dict[str, Any]) -> tuple[list[str], dict[str, None]]:
    """(command-line flags, fields set to null)."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), UniqueFields)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    except IsADirectoryError:
        raise SettingsError(f"{path}: expected a YAML file, got a folder") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a month 13, a number of 5000 digits, 3000 brackets
        raise SettingsError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected 'field: value' lines, got {type(content).__name__}")
    return _from_mapping(content, hints, str(path))


def _from_mapping(content: dict, hints: dict[str, Any], place: str) -> tuple[list[str], dict[str, None]]:
    flags: list[str] = []
    unset: dict[str, None] = {}
    for name, value in content.items():
        if name not in hints:
            raise SettingsError(f"{place}: {_no_such(str(name), hints)}")
        if value is None:
            if type(None) not in get_args(hints[name]):
                raise SettingsError(f"{place}: {name}: expected a value, got null")
            unset[name] = None
        elif isinstance(value, list) and not _takes_several(hints[name]):
            raise SettingsError(f"{place}: {name}: expected one value, got {len(value)} in a list")
        else:
            flags += _flags(name, value)
    return flags, unset


def _takes_several(hint: Any) -> bool:
    return any(part is list or get_origin(part) is list for part in (hint, *get_args(hint)))


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
