"""Data for training: load_examples -> tokenize_examples -> collator.

    examples = load_examples("pairs.jsonl")
    tokens = tokenize_examples(examples, tokenizer, max_length=2048, max_prompt_length=1800)
    batch = PreferenceCollator(tokenizer.pad_token_id)([tokens[0], tokens[1]])

An example is a prompt and its responses: a pair, a triple, or any number of either kind. A row that cannot be used is a
`DataError`, or is skipped and counted with `skip_bad_rows=True`. `load_triples` and `tokenize_triples` are the same two
functions under their first names.

Names are imported when they are first used: `wrpo sample` and `wrpo score` read rows without torch or `datasets`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_PLACE_OF = {
    "DataError": ("wrpo.rows.errors", "DataError"),
    "Layout": ("wrpo.data.layout", "Layout"),
    "PreferenceCollator": ("wrpo.data.collation", "PreferenceCollator"),
    "SFTCollator": ("wrpo.data.collation", "SFTCollator"),
    "load_examples": ("wrpo.data.loading", "load_examples"),
    "load_triples": ("wrpo.data.loading", "load_examples"),
    "tokenize_examples": ("wrpo.data.tokenization", "tokenize_examples"),
    "tokenize_triples": ("wrpo.data.tokenization", "tokenize_examples"),
}

__all__ = [
    "DataError",
    "Layout",
    "PreferenceCollator",
    "SFTCollator",
    "load_examples",
    "load_triples",
    "tokenize_examples",
    "tokenize_triples",
]

if TYPE_CHECKING:
    from wrpo.rows.errors import DataError

    from .collation import PreferenceCollator, SFTCollator
    from .layout import Layout
    from .loading import load_examples
    from .loading import load_examples as load_triples
    from .tokenization import tokenize_examples
    from .tokenization import tokenize_examples as tokenize_triples


def __getattr__(name: str) -> object:
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'wrpo.data' has no attribute {name!r}")
    module, own_name = _PLACE_OF[name]
    value = getattr(importlib.import_module(module), own_name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
