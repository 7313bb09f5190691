"""The arguments of an op: grouped in named tuples, as Python passes them on, and the flat list that a schema has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, get_type_hints

from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
    tuple[bool, ...]: "bool[]",
}


class Arguments:
    """Each of `parts` is a named tuple, whose fields are arguments, or one as a schema has it: "Tensor target".

    Tensors come first.
    """

    def __init__(self, *parts: type | str) -> None:
        words = [_words(part) for part in parts]
        kinds = [None if isinstance(part, str) else part for part in parts]
        self._groups = [(kind, len(fields)) for kind, fields in zip(kinds, words, strict=True)]
        self.schema = ", ".join(chain(*words))
        self.names = [word.split()[-1] for word in chain(*words)]
        self.tensors = sum(word.startswith("Tensor") for word in chain(*words))  # how many

    def flat(self, groups: Sequence[Any]) -> list[Any]:
        values: list[Any] = []
        for (kind, _), group in zip(self._groups, groups, strict=True):
            values += (group,) if kind is None else group
        return values

    def grouped(self, flat: Iterable[Any]) -> list[Any]:
        values = iter(flat)
        return [next(values) if kind is None else kind(*islice(values, size)) for kind, size in self._groups]


def _words(part: type | str) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(part).items()]
