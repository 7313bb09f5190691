"""A column `ref_logp` that was made by `wrpo logp`, and what lies beside its file of how it was made."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open

logger = logging.getLogger("wrpo.reference")


def sums_beside(rows: Path) -> Path:
    """Where `wrpo logp --reference` keeps the sums of the rows that it writes to this file."""
    return rows.with_name(f"{rows.name}.reference.safetensors")


def warn_of_other_logits(source: Any, rows: Any, logits_dtype: str | None) -> None:
    """One line where a 16-bit model made `ref_logp` with another `logits_dtype` than the run's, and where the run has
    one and nothing says how the column was made: on the main process, once a file.

    Silent where a float32 model made it, although a 16-bit run without `logits_dtype` rounds its own logits.

    Args:
        source: the file that was read; anything else has nothing beside it.
        rows: what `tokenize_examples` made of it.
        logits_dtype: of the run.
    """
    if "ref_logp" not in rows.column_names or not PartialState().is_main_process:
        return
    made, file = _settings_beside(source), source if isinstance(source, (str, Path)) else "data"
    if made is None and logits_dtype is not None:
        _warn_once(
            f"{file}: nothing beside it says how its ref_logp was made. Without logits_dtype {logits_dtype}, which "
            "this run has, log-ratios begin with the rounding of 16-bit logits: "
            f"`wrpo logp --logits_dtype {logits_dtype}`"
        )
    elif made is not None and made.get("dtype") != "torch.float32" and made.get("logits_dtype") != logits_dtype:
        _warn_once(
            f"{file}: ref_logp was made with logits_dtype {made.get('logits_dtype', 'none')} and this run has "
            f"{logits_dtype or 'none'}, so that log-ratios begin with the rounding of 16-bit logits: set the run's "
            "logits_dtype as in `wrpo logp`, or make the column again"
        )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _settings_beside(source: Any) -> dict[str, Any] | None:
    if not isinstance(source, (str, Path)) or not (path := sums_beside(Path(source))).exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["settings"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
