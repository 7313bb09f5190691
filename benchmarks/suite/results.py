"""The figures of a run: one dated CSV file a machine, written as they come, with the machine at its head."""

from __future__ import annotations

import csv
import tempfile
import types
import typing
from argparse import ArgumentTypeError
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite.problem import Setting


class Figure(NamedTuple):
    """One contestant on one problem. What was not measured is None; a contestant left out has its reason in `note`.

    Times are milliseconds; `times_floor` and `times_fused` are medians over rounds of the ratio of the whole step to
    its neighbours. peak_mib: above inputs, outputs and gradients. error_*: beside float64, see `suite.accuracy`.
    """

    scenario: str
    point: str
    contestant: str
    note: str = ""
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    forward_p20_ms: float | None = None
    forward_p50_ms: float | None = None
    forward_p80_ms: float | None = None
    backward_p20_ms: float | None = None
    backward_p50_ms: float | None = None
    backward_p80_ms: float | None = None
    times_floor: float | None = None
    times_fused: float | None = None
    peak_mib: float | None = None
    error_loss: float | None = None
    error_dh: float | None = None
    error_dW: float | None = None


class Row(NamedTuple):
    """A line of the file."""

    figure: Figure
    setting: Setting


COLUMNS = (*Figure._fields, *Setting._fields)
FACTS = ("machine", "device", "cores", "torch", "commit", "date", "command", "copy_gbs")  # what tables and pictures say


class DatedFile:
    """A CSV file with the facts at its head. Each line is on disk at once, so that a run that is cut off leaves what it
    has measured; numbers have five digits, and what was not measured is empty."""

    def __init__(self, path: Path, facts: dict[str, str], columns: Iterable[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", newline="")
        self._file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        self._table = csv.writer(self._file, lineterminator="\n")
        self._table.writerow(columns)

    def write(self, values: Iterable[object]) -> None:
        self._table.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in values])
        self._file.flush()


class ResultFile(DatedFile):
    """The file of `benchmarks.run`."""

    def __init__(self, path: Path, facts: dict[str, str]):
        super().__init__(path, facts, COLUMNS)

    def add(self, row: Row) -> None:
        self.write((*row.figure, *row.setting))


def file_name(facts: dict[str, str], scenarios: Iterable[str] = ()) -> str:
    """<machine>_<date>.csv, and behind the date what was run, if it was not everything."""
    words = "".join(c if c.isalnum() else " " for c in f"{facts['device']} {facts['machine']}").lower().split()
    return "_".join([*dict.fromkeys(words), facts["date"], *dict.fromkeys(scenarios)]) + ".csv"


def writable_folder(text: str | Path) -> Path:
    """A flag's folder, made if it is not there: what cannot be written is found before anything is measured."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentTypeError(f"cannot write into {folder}: {error.strerror}") from None
    return folder


def make_room(path: Path) -> None:
    """Moves a file of this name, and a picture of it, aside to the first free <stem>_1, <stem>_2, ...; and says so."""
    if not path.exists():
        return
    number = next(k for k in count(1) if not path.with_stem(f"{path.stem}_{k}").exists())
    for file in (path, path.with_suffix(".png")):
        if file.exists():
            file.rename(file.with_stem(f"{file.stem}_{number}"))
    print(f"{path} is of an earlier run: moved to {path.stem}_{number}{path.suffix}", flush=True)


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The facts at the head of a file, and its rows.

    Raises:
        ValueError: the file is not of `ResultFile`, or damaged.
    """
    facts, rows = read_table(path, Figure, Setting)
    if absent := [name for name in FACTS if not facts.get(name)]:
        raise ValueError(f"no line '# {absent[0]}: ...' at its head")
    return facts, [Row(*row) for row in rows]


def read_table(path: Path, *kinds) -> tuple[dict[str, str], list[tuple]]:
    """The facts at the head of a file, and of each line one of every kind, whose fields are its columns.

    Raises:
        ValueError: a column is missing, or a value is not of its type.
    """
    lines = path.read_text().splitlines()
    facts = {name: value for line in lines if line.startswith("# ") for name, _, value in [line[2:].partition(": ")]}
    table = csv.DictReader((line for line in lines if not line.startswith("# ")), restval="")
    if without := [name for kind in kinds for name in kind._fields if name not in (table.fieldnames or ())]:
        raise ValueError(f"no column {without[0]}")
    return facts, [tuple(_parsed(kind, values, number) for kind in kinds) for number, values in enumerate(table, 1)]


def _parsed(kind, values: dict[str, str], number: int):
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], values[name], f"row {number}, {name}") for name in kind._fields})


def _value(hint, text: str, place: str):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if text == "" and type(None) in options:
        return None
    try:
        return options[0](text)
    except ValueError:
        raise ValueError(f"{place}: expected {options[0].__name__}, got {text!r}") from None
