"""Training runs of seconds: settings, trainers and what to read off them."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model, tiny_rows
from torch import nn

from wrpo import WRPOConfig, WRPOTrainer

SETTINGS = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "draw_curves": False,
}
# Gradient descent without schedule, momentum or clipping: the change of the weights is the gradient.
ONE_GRADIENT = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
}


def wrpo_trainer(folder: Path, model: nn.Module | None = None, rows: list | None = None, **settings) -> WRPOTrainer:
    """A trainer of a tiny Llama on 8 tiny rows against a frozen copy, unless told otherwise."""
    names = ("eval_dataset", "ref_model", "processing_class", "compute_metrics", "data_collator")
    extra = {name: settings.pop(name) for name in names if name in settings}
    args = WRPOConfig(output_dir=str(folder), **{**SETTINGS, "reference": "copy", **settings})
    return WRPOTrainer(model or tiny_model(), args, train_dataset=tiny_rows() if rows is None else rows, **extra)


def weights(trainer: WRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def training_lines(trainer: WRPOTrainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]
