"""Memory that nothing refers to."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give it back; models lie in cycles of references, which only the collector ends."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
