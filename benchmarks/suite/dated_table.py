"""A dated CSV file of figures with the machine at its head, as `suite.results` writes it, for any columns."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite import machine
from benchmarks.suite.results import DatedFile, file_name, make_room, read_table, writable_folder


def add_out(parser: ArgumentParser) -> None:
    """The flag --out of every benchmark that writes files; its default is not touched where nothing is written."""
    folder = machine.ROOT / "benchmarks/results"
    parser.add_argument("--out", type=writable_folder, metavar="FOLDER", default=folder, help="for the files")


def add_draw(parser: ArgumentParser, kind: type[NamedTuple]) -> None:
    """The flag --draw; its value is the path of a picture, and the facts and rows of the file beside it."""

    def rows_of(text: str) -> tuple[Path, dict[str, str], list]:
        path = Path(text)
        try:
            facts, rows = read_table(path, kind)
        except OSError as error:
            raise ArgumentTypeError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ArgumentTypeError(f"expected a CSV file of this benchmark, got {path}: {error}") from None
        return path.with_suffix(".png"), facts, [row for (row,) in rows]

    parser.add_argument("--draw", type=rows_of, metavar="CSV", help="no measuring: the picture of this file")


def facts_of(module: str, device: str) -> dict[str, str]:
    """The facts of this machine and of the command that runs."""
    return machine.facts(device) | {"command": " ".join([f"python -m {module}", *sys.argv[1:]])}


def write(rows: Sequence[NamedTuple], facts: dict[str, str], folder: Path, prefix: str) -> Path:
    """One line for each row, its fields as columns; numbers with five digits. Returns the path."""
    path = folder / f"{prefix}_{file_name(facts)}"
    make_room(path)
    file = DatedFile(path, facts, rows[0]._fields)
    for row in rows:
        file.write(row)
    return path


def caption(facts: dict[str, str]) -> str:
    """What stands under a picture."""
    return f"{facts['machine']}, torch {facts['torch']}, {facts['date']}, {facts['commit']}"
