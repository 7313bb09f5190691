"""python docs/generate.py: writes docs/api.md from docstrings and docs/settings.md from the fields of the settings.

`make docs` runs it. A test compares both pages with what it would write.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from transformers import TrainingArguments

from wrpo import DPOConfig, SFTConfig, WRPOConfig
from wrpo.building.settings import BuildFiles, BuildSettings
from wrpo.evaluation.settings import EvalSettings, TriplesSettings
from wrpo.reference.command import LogpSettings
from wrpo.sampling.settings import SampleSettings, Sampling
from wrpo.sampling.sources import KINDS
from wrpo.scoring.judge import JudgeSource
from wrpo.scoring.settings import RewardModelSettings, ScorerSettings, ScoreSettings
from wrpo.settings import GROUPS, DataSettings, ModelSettings, choices_of

FOLDER = Path(__file__).resolve().parent
INTEGRATIONS = tuple(f"wrpo_kernels.integrations.{name}" for name in ("trl", "pytorch", "cce", "liger"))
MODULES = ("wrpo_kernels", "wrpo_kernels.environment", *INTEGRATIONS, "wrpo", "wrpo.data", "wrpo.head")
LISTS = ("Args", "Attributes", "Raises")  # headings of docstrings with an entry a name
TEXTS = ("Returns", "Numerics", "Memory", "Cost", "Source")

Classes = tuple[type, ...]
COMMANDS: dict[str, Classes] = {
    "train": (ModelSettings, DataSettings, WRPOConfig),
    "dpo": (ModelSettings, DataSettings, DPOConfig),
    "sft": (ModelSettings, DataSettings, SFTConfig),
    "sample": (SampleSettings, Sampling),
    "score": (ScoreSettings, ScorerSettings, RewardModelSettings),
    "build": (BuildFiles, BuildSettings),
    "logp": (LogpSettings,),
    "eval": (EvalSettings, ScorerSettings, TriplesSettings),
}
TOGETHER = (("train", "dpo", "sft"), ("sample",), ("score",), ("build",), ("logp",), ("eval",))  # commands of a section


# -- api.md -----------------------------------------------------------------------------------------------------------


def api_page() -> str:
    """Every public name: signature and docstring."""
    lines = [
        "# API",
        "",
        "Written by `make docs` from the docstrings. Shapes: S sequences, B rows or pairs, T positions, N positions",
        "that count, D hidden size, V vocabulary, G groups.",
        "",
    ]
    for module in map(importlib.import_module, MODULES):
        lines += [f"- **{module.__name__}**: " + ", ".join(f"[{name}](#{name.lower()})" for name in public(module))]
    for module in map(importlib.import_module, MODULES):
        lines += ["", f"## `{module.__name__}`", "", *as_markdown(inspect.getdoc(module) or "")]
        for name in documented_in(module):
            lines += ["", f"### {name}", "", *described(module.__name__, name, getattr(module, name))]
    forms = importlib.import_module("wrpo.data.forms")
    lines += ["", "## Forms of rows", "", *as_markdown(inspect.getdoc(forms) or "")]
    return "\n".join(lines) + "\n"


def public(module: Any) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("_")]


def documented_in(module: Any) -> Iterator[str]:
    """The public names but for those of an object that a module before it in `MODULES` has."""
    before = [importlib.import_module(name) for name in MODULES[: MODULES.index(module.__name__)]]
    shown = [getattr(other, name) for other in before for name in public(other)]
    return (name for name in public(module) if not any(getattr(module, name) is other for other in shown))


def described(module: str, name: str, value: Any) -> list[str]:
    own_name = getattr(value, "__name__", name)
    if own_name != name:
        return [f"The same as [{own_name}](#{own_name.lower()})."]
    text = as_markdown(inspect.getdoc(value) or "")
    if inspect.isclass(value) and issubclass(value, TrainingArguments):
        return [f"`from {module} import {name}`; its fields: [settings.md](settings.md).", "", *text]
    return ["```python", *signature(name, value), "```", "", *text]


def signature(name: str, value: Any) -> list[str]:
    """As a call on one line, or a line a parameter."""
    whole = inspect.signature(value)
    end = (
        ")" if isinstance(value, type) or whole.return_annotation is whole.empty else f") -> {whole.return_annotation}"
    )
    parameters = [as_written(parameter) for parameter in whole.parameters.values()]
    keywords = [place for place, p in enumerate(whole.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if keywords:
        parameters.insert(keywords[0], "*")
    line = f"{name}({', '.join(parameters)}{end}"
    return [line] if len(line) <= 100 else [f"{name}(", *(f"    {parameter}," for parameter in parameters), end]


def as_written(parameter: inspect.Parameter) -> str:
    """`name: type = default`, the type as its source has it."""
    annotation = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if annotation is parameter.empty else f": {annotation}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}".replace("'", '"')
    return f"{stars}{parameter.name}{kind}{default}"


def as_markdown(docstring: str) -> Iterator[str]:
    """Paragraphs as text, indented parts as code, the headings of the house in bold with a list beneath."""
    runs = (run for block in re.split(r"\n\s*\n", docstring) for run in parts(block.splitlines()))
    for number, (heading, lines) in enumerate(runs):
        if number:
            yield ""
        if heading in LISTS:
            yield from (f"**{heading}**", "", *entries(lines))
        elif heading:
            yield f"**{heading}:** {joined(lines)}"
        elif lines[0].startswith(" "):
            yield from ("```text", *textwrap.dedent("\n".join(lines)).splitlines(), "```")
        else:
            yield from lines


def parts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(heading or "", its lines); without a heading a run of lines that are all indented, or all not."""
    heading, found = "", []
    for line in lines:
        match = re.match(rf"({'|'.join(LISTS + TEXTS)}):\s*(.*)", line)
        is_break = match or (found and not heading and line.startswith(" ") != found[-1].startswith(" "))
        if is_break and found:
            yield heading, found
            heading, found = "", []
        if match:
            heading, found = match[1], [match[2]]
        else:
            found.append(line)
    yield heading, found


def entries(lines: list[str]) -> Iterator[str]:
    """`name, name: text` with its continuation, as an item of a list."""
    text = textwrap.dedent("\n".join(line for line in lines if line.strip()))
    for entry in re.split(r"\n(?=\S)", text):
        names, _, meaning = joined(entry.splitlines()).partition(": ")
        yield f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {meaning}"


def joined(lines: Iterable[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())


# -- settings.md ------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of every command by group: name, default, meaning."""
    lines = [
        "# Settings",
        "",
        "Written by `make docs` from the fields. Every command takes its settings as flags (`--max_length 1024`, also",
        "`--max-length`) and from a YAML file with the same names (`--config FILE.yaml`); flags win. `none` unsets",
        "what may be unset. `wrpo COMMAND --help` shows the same list.",
    ]
    for commands in TOGETHER:
        lines += ["", f"## {', '.join(f'wrpo {command}' for command in commands)}"]
        settings = {command: command_settings(COMMANDS[command]) for command in commands}
        for group in GROUPS:
            rows = list(table_of(group, settings))
            lines += (
                ["", f"### {group}", "", "| setting | default | meaning |", "| --- | --- | --- |", *rows]
                if rows
                else []
            )
        if len(commands) > 1:
            link = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
            lines += ["", f"Every other field of [transformers.TrainingArguments]({link}) works as documented there."]
    for name, kind in {
        **{f"SOURCES.yaml, kind `{kind}`": cls for kind, cls in KINDS.items()},
        "JUDGE.yaml": JudgeSource,
    }.items():
        lines += ["", f"## {name}", "", *as_markdown(inspect.getdoc(kind) or "")]
        lines += ["", "| field | default | meaning |", "| --- | --- | --- |", *map(row_of, settings_of(kind))]
    return "\n".join(lines) + "\n"


class Setting(NamedTuple):
    field: dataclasses.Field
    choices: tuple[str, ...]


def settings_of(cls: type) -> list[Setting]:
    hints = get_type_hints(cls)
    return [Setting(field, choices_of(hints[field.name])) for field in dataclasses.fields(cls)]


def command_settings(classes: Classes) -> dict[str, Setting]:
    every = (setting for cls in classes for setting in settings_of(cls))
    return {setting.field.name: setting for setting in every if "group" in setting.field.metadata}


def table_of(group: str, settings: dict[str, dict[str, Setting]]) -> Iterator[str]:
    """A row for each field of the group that any of the commands has."""
    for name in dict.fromkeys(name for of_command in settings.values() for name in of_command):
        having = {command: of_command[name] for command, of_command in settings.items() if name in of_command}
        first = next(iter(having.values()))
        if first.field.metadata["group"] == group:
            others = {command: default_in_words(setting) for command, setting in having.items()}
            differ = [f"{command} {value}" for command, value in others.items() if value != default_in_words(first)]
            only = f" ({', '.join(having)})" if len(having) < len(settings) else ""
            default = f"{default_in_words(first)} ({', '.join(differ)})" if differ else None
            yield row_of(first, default, only)


def row_of(setting: Setting, default: str | None = None, only: str = "") -> str:
    field = setting.field
    names = ", ".join(f"`{name}`" for name in (field.name, *field.metadata.get("aliases", ())))
    text = field.metadata.get("help", "").replace("|", "\\|")
    if setting.choices:
        text += f" Choices: {', '.join(f'`{choice}`' for choice in setting.choices)}."
    return f"| {names}{only} | {default or default_of(setting)} | {text} |"


def default_of(setting: Setting) -> str:
    field = setting.field
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == [] or value == "":
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def default_in_words(setting: Setting) -> str:
    """Where the field's own default says nothing, what its text says."""
    said = re.search(r"Default: (.+?)\.( |$)", setting.field.metadata.get("help", ""))
    return default_of(setting) or (said[1] if said else "")


PAGES = {"api.md": api_page, "settings.md": settings_page}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
        print(f"wrote {FOLDER.name}/{name}")
