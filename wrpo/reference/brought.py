"""A column `ref_logp` that was made by `wrpo logp`, and what lies beside its file of how it was made."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger("wrpo.reference")


def sums_beside(rows: Path) -> Path:
    """Where `wrpo logp --reference` keeps the sums of the rows that it writes to this file."""
    return rows.with_name(f"{rows.name}.reference.safetensors")


def warn_of_other_logits(source: Any, rows: Any, logits_dtype: str | None) -> None:
    """One line where the log-probs that rows bring along and those of the run are not rounded alike.

    Args:
        source: the file that was read; anything else has nothing beside it.
        rows: what `tokenize_examples` made of it.
        logits_dtype: of the run.
    """
    if "ref_logp" not in rows.column_names:
        return
    made = _settings_beside(source)
    if made is None and logits_dtype is not None:
        logger.warning(
            "Nothing beside the data says how its ref_logp was made. Without logits_dtype %s, which this run has, "
            "log-ratios begin with the rounding of 16-bit logits: `wrpo logp --logits_dtype %s`",
            logits_dtype, logits_dtype,
        )  # fmt: skip
    elif made is not None and made.get("dtype") != "torch.float32" and made.get("logits_dtype") != logits_dtype:
        logger.warning(
            "%s: ref_logp was made with logits_dtype %s and this run has %s, so that log-ratios begin with the "
            "rounding of 16-bit logits: set the run's logits_dtype as in `wrpo logp`, or make the column again",
            source, made.get("logits_dtype", "none"), logits_dtype or "none",
        )  # fmt: skip


def _settings_beside(source: Any) -> dict[str, Any] | None:
    if not isinstance(source, (str, Path)) or not (path := sums_beside(Path(source))).exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["settings"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
