"""The causal language model of a command: a checkpoint, a checkpoint with a fresh LoRA, or an adapter on its model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from wrpo.settings import ModelSettings

from .adapter import check_goes_on, find_adapter, put_on, put_on_fresh
from .checkpoint import load_checkpoint

logger = logging.getLogger("wrpo")


def load_model(
    settings: ModelSettings,
    field: str = "model_name_or_path",
    *,
    auto: Any = AutoModelForCausalLM,
    is_trained: bool = False,
) -> Any:
    """The model that the settings name, in evaluation mode.

    An adapter's folder or repository is loaded on its model: what was saved is what is there. Without one, `lora_r` > 0
    puts a fresh LoRA on.

    Args:
        settings: see there.
        field: the setting that the user gave the name in, for messages.
        auto: class of transformers. Default: `AutoModelForCausalLM`.
        is_trained: whether an adapter that is loaded is trained on; frozen otherwise. Default: False.

    Raises:
        SettingsError: nothing to load there, weights that are missing or of another shape, or a module to adapt that
            the model does not have.
    """
    adapter = find_adapter(settings, field)
    if adapter is None:
        model = load_checkpoint(auto, settings, field)
        return put_on_fresh(model, settings) if settings.lora_r else model
    base = load_checkpoint(auto, replace(settings, model_name_or_path=adapter.base), f"{adapter.place}, whose model is")
    if is_trained:
        kept = ", ".join(f"{name} {value}" for name, value in adapter.lora.items() if value is not None)
        logger.info("%s: training goes on with its adapter on %s: %s", adapter.place, adapter.base, kept)
    return put_on(base, adapter, is_trained=is_trained)


def check_adapter(settings: ModelSettings, field: str = "model_name_or_path") -> bool:
    """Whether training would go on with an adapter, found out before anything is loaded.

    Raises:
        SettingsError: the settings ask for other training than that: all weights, or another LoRA.
    """
    adapter = find_adapter(settings, field)
    if adapter is not None:
        check_goes_on(adapter, settings)
    return adapter is not None


def warn_of_coarse_weights(model: Any) -> None:
    """Before training: that steps of full fine-tuning would be lost in weights of 16 bits."""
    coarse = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if coarse and not hasattr(model, "peft_config"):
        logger.warning(
            "The weights are %s: steps smaller than about 1/256 of a weight are rounded away. "
            "Full fine-tuning wants torch_dtype: float32 with bf16: true.",
            coarse.pop(),
        )
