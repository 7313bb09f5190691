"""Every prompt id has a place, and a shard is a range of places: `wrpo sample`, `score` and `build` share them.

Needs the standard library alone, so that a command asks in milliseconds.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SEED = 42  # of `wrpo build` by default: the answers of shard i/n are then what its shard i/n reads
ORDER_BITS = 64

_PLACE = struct.Struct(">QQ")


def place(prompt_id: str, seed: int) -> tuple[int, float]:
    """(order: 64 bits, split: in [0, 1)), uniform, independent, and fixed by prompt id and seed."""
    hasher = _seeded(seed).copy()
    hasher.update(prompt_id.encode())
    order, split = _PLACE.unpack(hasher.digest())
    return order, (split >> 11) / 2**53


@lru_cache
def _seeded(seed: int) -> Any:
    return hashlib.blake2b(digest_size=_PLACE.size, salt=seed.to_bytes(hashlib.blake2b.SALT_SIZE, "big"))


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` equal ranges of the order, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """From "i/n"; None is the whole.  ValueError: anything else, or i not in 0..n-1."""
        if text is None:
            return cls(0, 1)
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"shard: expected i/n with i from 0 to n - 1, for example 0/4, got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def holds(self, order: int) -> bool:
        return order * self.count >> ORDER_BITS == self.index


def in_shard(text: str | None) -> Callable[[str], bool]:
    """From "i/n", i from 0: whether the shard holds a prompt id; None is the whole.  ValueError: as `Shard.parse`."""
    if text is None:
        return lambda prompt_id: True
    shard = Shard.parse(text)
    return lambda prompt_id: shard.holds(place(prompt_id, SEED)[0])
