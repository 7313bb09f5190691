"""The only place that chooses which implementation of an op runs.

Every op folder holds its implementations as modules with the same functions, a `NAME`, and

    refuses(*facts) -> str | None        why it cannot do this call; None when it can

`choose` walks them in order of preference, past those whose `waits_to_be_named(*facts)` gives a reason (few have one).
A backend that the caller names either runs or raises with its reason: nothing named ever falls back in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

from wrpo_kernels.dispatch.triton_backend import TritonBackend

Backend = ModuleType | TritonBackend
_COMPILER = {"_cpu": "C++ compiler", "_cuda": "nvcc"}


@cache
def load_extension(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module `wrpo_kernels.<name>` and, when there is none, the reason.

    An extension that was never built is silent; one that is present but does not load warns once, with the cause.
    """
    full_name = f"wrpo_kernels.{name}"
    if importlib.util.find_spec(full_name) is None:
        return None, f"{full_name} was not built (WRPO_BUILD, or no {_COMPILER[name]} at install time)"
    try:
        return importlib.import_module(full_name), ""
    except Exception as error:  # another pybind11, another C++ runtime: whatever it is, say so and go on
        warnings.warn(f"{full_name} is installed but does not load: {error}", RuntimeWarning, stacklevel=2)
        return None, f"{full_name} is installed but does not load: {error}"


def why_not(module: Backend, *facts: object) -> str | None:
    """Why a backend does not run when none was named; None when it can."""
    waits = _waits_of(module)
    return module.refuses(*facts) or (waits(*facts) if waits else None)


@cache
def _waits_of(module: Backend) -> Callable | None:
    """Kept, because a module takes 2 us to say that it has no such name."""
    return getattr(module, "waits_to_be_named", None)


def check_name(backend: str | None, candidates: tuple[Backend, ...]) -> None:
    if backend is not None and backend not in (names := [module.NAME for module in candidates]):
        raise ValueError(f"backend must be one of {names} or None, got {backend!r}")


def choose(backend: str | None, candidates: tuple[Backend, ...], *facts: object) -> Backend:
    """The implementation that runs: the one named, or the first that does not refuse.

    Raises:
        ValueError: no candidate has that name.
        RuntimeError: the named backend refuses, or all do; the message holds each reason.
    """
    check_name(backend, candidates)
    reasons = []
    for module in candidates:
        if backend not in (None, module.NAME):
            continue
        reason = module.refuses(*facts) if backend else why_not(module, *facts)
        if reason is None:
            return module
        if backend:
            raise RuntimeError(f"backend={backend!r} cannot do this call: {reason}")
        reasons.append(f"{module.NAME}: {reason}")
    raise RuntimeError("no backend can do this call; " + "; ".join(reasons))
