"""The model and the tokenizer that settings name: loaded whole, or refused in one line.

tokenizer.py    the tokenizer and its chat template
checkpoint.py   a checkpoint of transformers, each of whose parameters was in its files
adapter.py      adapters of PEFT: fresh ones, and those of a folder
model.py        the causal language model of a command
memory.py       memory that nothing refers to
"""

from __future__ import annotations

from .memory import free_memory
from .model import check_adapter, load_model, warn_of_coarse_weights
from .tokenizer import load_tokenizer, plain_template, require_template

__all__ = [
    "check_adapter",
    "free_memory",
    "load_model",
    "load_tokenizer",
    "plain_template",
    "require_template",
    "warn_of_coarse_weights",
]
