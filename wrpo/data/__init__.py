"""Data for WRPO: load_triples -> tokenize_triples -> collator.

    triples = load_triples("triples.jsonl")
    tokens = tokenize_triples(triples, tokenizer, max_length=2048, max_prompt_length=1800)
    batch = PreferenceCollator(tokenizer.pad_token_id)([tokens[0], tokens[1]])

A row that cannot be used is a `DataError`, or is skipped and counted with `skip_bad_rows=True`.

Names are imported when they are first used: `wrpo sample` and `wrpo score` read rows without torch or `datasets`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_MODULE_OF = {
    "DataError": "wrpo.rows.errors",
    "PreferenceCollator": "wrpo.data.collation",
    "SFTCollator": "wrpo.data.collation",
    "load_triples": "wrpo.data.loading",
    "tokenize_triples": "wrpo.data.tokenization",
}

__all__ = ["DataError", "PreferenceCollator", "SFTCollator", "load_triples", "tokenize_triples"]

if TYPE_CHECKING:
    from wrpo.rows.errors import DataError

    from .collation import PreferenceCollator, SFTCollator
    from .loading import load_triples
    from .tokenization import tokenize_triples


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'wrpo.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
