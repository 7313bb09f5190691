"""Rows of one prompt together, whatever their order in the input, in constant memory.

A keyed hash gives every prompt id a place: 64 bits that order the prompts and a number that splits them. Rows go to
temporary files by the first bits of their order; each file, small enough to hold, is then sorted. A file that is
larger than the budget is divided again by the next bits. So prompts come out ordered by their hash: a random order that
the seed decides and that neither the order of the rows nor the number of files can change. A shard is a range of the
hash, and the outputs of all shards, one after another, are the output of the whole.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from wrpo.rows.shards import ORDER_BITS

PARTITION_BYTES = 32 << 20  # of temporary file that is held in memory at a time, about three times that as objects
BITS = 6  # 64 files open a level
LEVELS = 4  # 64^4 files of 32 MiB are 512 TiB; beyond that it is one prompt that is too large

_LENGTH = struct.Struct("<Q")

Record = tuple[Any, ...]  # order, prompt id, and what else a row has


class PromptGroups:
    """`add` every record, then iterate once: lists of the records of one prompt, prompts by (order, prompt id).

    Args:
        directory: where the temporary files are, nameless, so that a killed process leaves none. Default: the system's.
        partition_bytes: most bytes of records held in memory at a time, as long as no prompt alone has more.
    """

    def __init__(self, directory: Path | None = None, partition_bytes: int = PARTITION_BYTES, level: int = 0):
        self._directory, self._partition_bytes, self._level = directory, partition_bytes, level
        self._shift = ORDER_BITS - BITS * (level + 1)
        self._files: dict[int, IO[bytes]] = {}

    def add(self, record: Record) -> None:
        number = record[0] >> self._shift & (1 << BITS) - 1
        file = self._files.get(number)
        if file is None:
            file = self._files[number] = TemporaryFile(dir=self._directory, buffering=1 << 16)  # noqa: SIM115
        packed = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        file.write(_LENGTH.pack(len(packed)))
        file.write(packed)

    def __iter__(self) -> Iterator[list[Record]]:
        for number in sorted(self._files):
            with self._files.pop(number) as file:
                size = file.tell()
                file.seek(0)
                if size > self._partition_bytes and self._level + 1 < LEVELS:
                    yield from self._divided(file)
                else:
                    records = sorted(_load(file), key=itemgetter(0, 1))
                    yield from (list(group) for _, group in groupby(records, itemgetter(1)))

    def _divided(self, file: IO[bytes]) -> Iterator[list[Record]]:
        with PromptGroups(self._directory, self._partition_bytes, self._level + 1) as parts:
            for record in _load(file):
                parts.add(record)
            yield from parts

    def __enter__(self) -> PromptGroups:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _load(file: IO[bytes]) -> Iterator[Record]:
    while head := file.read(_LENGTH.size):  # four times as fast as pickle.load from the file
        yield pickle.loads(file.read(*_LENGTH.unpack(head)))
