"""The loss inside the model's own forward: `install_fused_head` puts it there, `run_in_head` calls it."""

from __future__ import annotations

from .attention import model_inputs
from .fused_head import adapts_tied_weight, install_fused_head, remove_fused_head, run_in_head

__all__ = ["adapts_tied_weight", "install_fused_head", "model_inputs", "remove_fused_head", "run_in_head"]
