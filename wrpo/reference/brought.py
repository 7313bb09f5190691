"""A column `ref_logp` that was made by `wrpo logp`, and what lies beside its file of how it was made."""

from __future__ import annotations

import json
import logging
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

logger = logging.getLogger("wrpo.reference")


def sums_beside(rows: Path) -> Path:
    """Where `wrpo logp --reference` keeps the sums of the rows that it writes to this file."""
    return rows.with_name(f"{rows.name}.reference.safetensors")


def warn_of_other_rounding(source: Any, rows: Any, model: Any, args: Any) -> None:
    """One line, on the main process and once a file, where logits were rounded to 16 bits for the `ref_logp` of a file
    alone or for the run alone.

    Args:
        source: what was read: a file, or a dict of several; anything else has nothing beside it.
        rows: what `tokenize_examples` made of it.
        model: the policy.
        args: `bf16`, `fp16` and `logits_dtype` of the run.
    """
    if isinstance(source, dict):
        for name, one in source.items():
            warn_of_other_rounding(one, rows[name], model, args)
        return
    if not isinstance(source, (str, Path)) or not PartialState().is_main_process:
        return
    if not len(rows) or "ref_logp" not in rows[0]:
        return
    made, is_narrow = _settings_beside(Path(source)), args.bf16 or args.fp16 or _has_16_bits(model)
    is_rounded = is_narrow and args.logits_dtype is None
    if made is None and is_narrow and not is_rounded:
        _warn_once(
            f"{source}: nothing beside it says whether its ref_logp was made with logits_dtype {args.logits_dtype}, as "
            "this run has it. If not, log-ratios begin with the rounding of 16-bit logits"
        )
    if made is not None and _is_rounded(made) != is_rounded:
        sides = ("this run", "its ref_logp") if is_rounded else ("its ref_logp", "this run")
        _warn_once(
            f"{source}: {sides[0]} rounds its logits to 16 bits and {sides[1]} does not, so that log-ratios begin with "
            "that rounding. logits_dtype float32 spares it, here and in `wrpo logp`"
        )


def _has_16_bits(model: Any) -> bool:
    return any(parameter.dtype.itemsize == 2 for parameter in islice(model.parameters(), 1))


def _is_rounded(made: dict[str, Any]) -> bool:
    return made.get("dtype") != "torch.float32" and made.get("logits_dtype") is None


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _settings_beside(rows: Path) -> dict[str, Any] | None:
    if not rows.name or not (path := sums_beside(rows)).exists():  # "." has no name
        return None
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["settings"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
