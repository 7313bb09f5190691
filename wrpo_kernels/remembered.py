"""What is found out about a call without reading a value, for the next call of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

TENSORS = {Tensor, torch.nn.Parameter}
OPTIONS = {type(None), bool, int, float, str, torch.dtype, torch.device}  # two of one type that are equal are the same
MOST_KEPT = 256
facts_of = attrgetter("is_nested", "shape", "dtype", "device", "layout", "requires_grad")
Found = TypeVar("Found")
NOTHING = object()


def remembered(function: Callable[..., Found]) -> Callable[..., Found]:
    """`function` of tensors and options, none a container: what it returned is kept for arguments of the same kinds.

    Of a tensor it may look at the facts above alone, and return none. What it raises is raised each time. Compiled
    code and arguments of any other type, such as a subclass of Tensor, go past what is kept.
    """
    known = TENSORS | OPTIONS
    kept: dict[tuple, Any] = {}

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Found:
        types = tuple(map(type, arguments))
        if named or is_compiling() or not known.issuperset(types):
            return function(*arguments, **named)
        try:
            kinds = [facts_of(x) if kind in TENSORS else x for kind, x in zip(types, arguments, strict=True)]
        except RuntimeError:  # a nested tensor has no shape
            return function(*arguments)
        key = (types, *kinds)
        found = kept.get(key, NOTHING)
        if found is NOTHING:
            found = function(*arguments)
            if len(kept) >= MOST_KEPT:
                kept.clear()
            kept[key] = found
        return found

    return call
