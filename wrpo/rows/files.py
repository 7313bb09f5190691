"""The files that paths and globs name, each once: read twice, a row would be its own repetition."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path


def files_once(paths: Sequence[str | Path]) -> list[str]:
    """In the order of the paths, under the first name that each has; links are followed to tell them apart."""
    found: dict[Path, str] = {}
    for path in map(str, paths):
        named = [] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        for part in named or [path]:
            found.setdefault(Path(part).resolve(), part)
    return list(found.values())
