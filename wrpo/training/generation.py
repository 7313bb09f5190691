"""How a saved model will generate: settings that can be saved, and the tokens that its data ends answers with.

`generation_config.json` of a released model may hold what transformers refuses to write again, such as a temperature
without sampling, and need not know the end of turn that a chat template teaches. Whatever runs the saved model goes by
it.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from typing import Any

from transformers import GenerationConfig

from wrpo.data.model_limits import vocabulary_size
from wrpo.rows.errors import shown

logger = logging.getLogger("wrpo")

ROWS = 1000  # that are looked at for the tokens that end answers
SHARE = 0.05  # of the answers that end with a token, for it to be one that training teaches: others were cut there
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "max_length", "max_new_tokens",
           "min_length", "min_new_tokens")  # fmt: skip


def prepare_generation(model: Any, rows: Any, tokenizer: Any) -> None:
    """Before training: make the generation settings of the model such that they can be saved, and end where its data
    ends.

    Args:
        model: of transformers, in PEFT's or not; one without generation settings is left alone.
        rows: tokenised, to be trained on; a stream is not looked at.
        tokenizer: says which tokens are special. None: no end is added.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(model, "generation_config", None) is None:
        return
    sound, unusable = without_unusable(model.generation_config, vocabulary_size(model))
    model.generation_config, change = saveable(sound)
    if unusable:
        logger.warning("The model's generation_config is saved without what cannot be used: %s", unusable)
    if change:
        logger.warning("The model's generation_config could not be saved as it is: %s", change)
    known = end_tokens(model.generation_config)
    if new := [token for token in taught_ends(rows, tokenizer) if token not in known]:
        model.generation_config.eos_token_id = [*known, *new]
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(new)))
        logger.info("Answers of the data end with %s: the saved model stops there too (generation_config)", names)


def end_tokens(config: Any) -> list[int]:
    """Ids at which generation ends."""
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def without_unusable(config: GenerationConfig, vocabulary: int) -> tuple[GenerationConfig, str]:
    """(settings without token ids that the model does not have, and numbers that are none; what is left out, or "")."""
    changes: dict[str, Any] = {}
    left_out = []
    for name in IDS:
        given = getattr(config, name, None)
        ids = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
        kept = [token for token in ids if _is_number(token, int) and token < vocabulary]
        if len(kept) < len(ids):
            changes[name] = kept if kept and isinstance(given, (list, tuple)) else None
            strange = ", ".join(shown(token) for token in ids if token not in kept)
            left_out.append(f"{name} {strange} (expected an id below {vocabulary})")
    for name in NUMBERS:
        value = getattr(config, name, None)
        if value is not None and not _is_number(value, (int, float)):
            changes[name] = None
            left_out.append(f"{name} {shown(value)} (expected a number)")
    return (_changed(config, **changes) if changes else config), ", ".join(left_out)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 <= value < math.inf


def taught_ends(rows: Any, tokenizer: Any) -> list[int]:
    """Special tokens that answers of the data end with, by the first `ROWS` rows."""
    if tokenizer is None or not hasattr(rows, "__len__"):
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, of_token in added.items() if of_token.special}
    sample = (rows[index] for index in range(min(ROWS, len(rows))))
    ends = Counter(ids[-1] for row in sample for ids in row["response_ids"] if ids)
    return [token for token, count in ends.most_common() if token in special and count >= SHARE * ends.total()]


def saveable(config: GenerationConfig) -> tuple[GenerationConfig, str]:
    """(settings that transformers saves, what was changed about them; "" if they are as they were)."""
    complaint = _complaint(config)
    if not complaint:
        return config, ""
    sampling = _changed(config, do_sample=True)
    if not _complaint(sampling):
        return sampling, "do_sample is true now, without which temperature and its like are refused"
    refused = re.findall(r"^- `(\w+)`", complaint, re.MULTILINE)
    without = _changed(config, **dict.fromkeys(refused))
    if refused and not _complaint(without):
        return without, f"it is saved without {', '.join(refused)}"
    ids = {name: getattr(config, name, None) for name in IDS}
    return GenerationConfig(**ids), f"all but its token ids is left out ({' '.join(complaint.split())[:200]})"


def _changed(config: GenerationConfig, **values: Any) -> GenerationConfig:
    changed = copy.deepcopy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def _complaint(config: GenerationConfig) -> str:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
