"""Data for WRPO: load_triples -> tokenize_triples -> collator.

    triples = load_triples("triples.jsonl")
    tokens = tokenize_triples(triples, tokenizer, max_length=2048, max_prompt_length=1800)
    batch = PreferenceCollator(tokenizer.pad_token_id)([tokens[0], tokens[1]])

A row that cannot be used is a `DataError`, or is skipped and counted with `skip_bad_rows=True`.
"""

from __future__ import annotations

from .collation import PreferenceCollator, SFTCollator
from .errors import DataError
from .loading import load_triples
from .tokenization import tokenize_triples

__all__ = ["DataError", "PreferenceCollator", "SFTCollator", "load_triples", "tokenize_triples"]
