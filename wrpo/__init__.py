"""Weighted-Reward Preference Optimization (arXiv:2412.03187) on `transformers.Trainer`, the loss fused into the head.

    from wrpo import WRPOConfig, WRPOTrainer
    WRPOTrainer("path/to/model", WRPOConfig(output_dir="out"), train_dataset="triples.jsonl").train()

Names are imported when they are first used: `import wrpo` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_MODULE_OF = {
    "DPOConfig": "wrpo.training.wrpo_config",
    "SFTConfig": "wrpo.training.config",
    "WRPOConfig": "wrpo.training.wrpo_config",
    "install_fused_head": "wrpo.head",
    "run_in_head": "wrpo.head",
    "SFTTrainer": "wrpo.training.sft_trainer",
    "WRPOTrainer": "wrpo.training.wrpo_trainer",
    "__version__": "wrpo_kernels",
}

__all__ = [
    "DPOConfig",
    "SFTConfig",
    "SFTTrainer",
    "WRPOConfig",
    "WRPOTrainer",
    "__version__",
    "install_fused_head",
    "run_in_head",
]

if TYPE_CHECKING:
    from wrpo.head.fused_head import install_fused_head, run_in_head
    from wrpo.training.config import SFTConfig
    from wrpo.training.sft_trainer import SFTTrainer
    from wrpo.training.wrpo_config import DPOConfig, WRPOConfig
    from wrpo.training.wrpo_trainer import WRPOTrainer
    from wrpo_kernels import __version__


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'wrpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
