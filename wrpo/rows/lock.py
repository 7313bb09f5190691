"""One process at a time: a file that the operating system locks (`flock`), and lets go of when its holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wrpo.user_error import UserError


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock `path`; the file is there only as long.

    Raises:
        UserError: `busy`, while another process holds it.
    """
    file = _lock(path, busy)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _lock(path: Path, busy: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(path, file):
                return file
        except BlockingIOError:
            os.close(file)
            raise UserError(busy) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the holder before has removed it in between: a newcomer would lock another file


def _is_still_there(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
