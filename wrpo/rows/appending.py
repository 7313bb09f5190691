"""Rows appended to a JSON lines file that one process holds, so that a killed run loses nothing that it wrote.

A row is one line, written whole and handed to the operating system at once: it survives the death of the process, not
that of the machine. What a kill can leave is a torn last line, which is cut off when the file is next opened. The lock
is the operating system's (`flock`), so a dead process holds none.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from wrpo.user_error import UserError

from .errors import DataError
from .json_lines import json_line
from .reading import read_rows

logger = logging.getLogger("wrpo")

BLOCK = 1 << 16


class AppendedRows:
    """The rows of a file, and `append`.

    Args:
        path: `.jsonl`; made if it is not there, and its folder.
        first_field: the field that every row begins with. A torn last line is cut off only if it begins like that:
            anything else is somebody's text.

    Raises:
        UserError: another ending, a file that another process appends to, one that cannot be opened or locked, or
            something that is no file, such as a pipe or a device.
    """

    def __init__(self, path: str | Path, first_field: str = "prompt_id"):
        self.path = Path(path)
        self._row_start = b'{"' + first_field.encode() + b'"'
        if self.path.suffix != ".jsonl":
            raise UserError(f"{self.path}: expected a file name ending in .jsonl, got {self.path.name!r}")
        self._file = _opened_for_appending(self.path)
        try:
            self._lock()
            self._repair_last_line()
        except OSError as error:
            os.close(self._file)
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        except UserError:
            os.close(self._file)
            raise

    def __enter__(self) -> AppendedRows:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        """(row number from 1, row) of everything in the file.

        Raises:
            DataError: a line that is no row.
        """
        for _, number, row in read_rows(str(self.path)):
            if isinstance(row, DataError):
                raise row
            yield number, row

    def append(self, row: dict[str, Any]) -> None:
        """Raises UserError where the disk is full or gone; what was written before stays."""
        line = json_line(row)
        size = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, size)  # other answers, on their way while this one fails, may still fit
            todo = "What was written before is safe; the same command continues."
            raise UserError(f"{self.path}: cannot be written: {error.strerror}. {todo}") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            todo = "Wait for it, or write to another file (with --shard a part of the prompts)."
            raise UserError(f"{self.path}: another process is writing it. {todo}") from None
        except OSError as error:
            todo = "Name a file on another file system."
            raise UserError(f"{self.path}: its file system has no locks: {error.strerror}. {todo}") from error

    def _repair_last_line(self) -> None:
        """End the last line, or cut off one that a kill has torn."""
        end = os.fstat(self._file).st_size
        start = self._last_line_start(end)
        last = os.pread(self._file, end - start, start)
        if not last:
            return
        if _is_object(last):
            os.write(self._file, b"\n")
        elif last.startswith(self._row_start) or self._row_start.startswith(last):
            os.ftruncate(self._file, start)
            logger.warning("%s: the last line was torn when a run was killed; cut it off", self.path)

    def _last_line_start(self, end: int) -> int:
        """Where the text after the last line end begins."""
        while end > 0:
            start = max(0, end - BLOCK)
            found = os.pread(self._file, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0


def _opened_for_appending(path: Path) -> int:
    """The file for reading and appending; it is looked at before it is opened, for a device may act on that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            got = "a folder" if path.is_dir() else "a pipe, socket or device"
            raise UserError(f"{path}: expected a regular file, got {got}. Name another output file.")
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class KeySet:
    """Which keys are there, in 8 bytes a key: `add` them all, then ask with `in`.

    Keys are tuples of str and int. Two of ten million share their 64-bit hash with probability 3e-6.
    """

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._is_sorted = True

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, key: tuple[str | int, ...]) -> None:
        self._hashes.append(hash_of(key))
        self._is_sorted = False

    def __contains__(self, key: tuple[str | int, ...]) -> bool:
        if not self._is_sorted:
            np.frombuffer(self._hashes, dtype=np.uint64).sort()
            self._is_sorted = True
        place = bisect_left(self._hashes, hash_of(key))
        return place < len(self._hashes) and self._hashes[place] == hash_of(key)


def hash_of(key: tuple[str | int, ...]) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
