"""Memory of models that are no longer needed."""

from __future__ import annotations

import gc

import torch


def free_unused() -> None:
    """Give back what nothing refers to; models lie in cycles of references, which only the collector ends."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
