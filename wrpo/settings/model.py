"""Which model is trained, and which part of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from .fields import REQUIRED, check_choices, check_range, knob


@dataclass
class ModelSettings:
    """Which model is trained, and which part of it.

    Raises:
        ValueError: a value out of range, settings that contradict each other, or LoRA without the package peft.
    """

    model_name_or_path: str = knob(
        REQUIRED,
        "Folder or hub name of the target model and its tokenizer. Of a LoRA: training goes on with it (lora_r is its "
        "rank), the reference is the model with it as it is, and what is saved is an adapter on the same model again.",
        group="model",
    )
    gguf_file: str | None = knob(None, "GGUF file in that folder to take weights and tokenizer from.", group="model")
    torch_dtype: Literal["float32", "bfloat16", "float16", "auto"] = knob(
        "float32",
        "Type of the weights in memory; auto: as saved. Full fine-tuning wants float32 (with bf16: true for speed): "
        "bfloat16 weights round the paper's small steps away. Under LoRA bfloat16 is fine.",
        group="model",
    )
    attn_implementation: str | None = knob(
        None, "Attention of transformers: eager, sdpa, flash_attention_2.", group="speed"
    )
    chat_template: str | None = knob(
        None,
        "none: prompt and answer as they are, then the end-of-sequence token; saved with the model, so that wrpo "
        "sample and wrpo eval ask it the same way. Default: the tokenizer's template; without one it is refused.",
        group="model",
    )
    chat_template_file: str | None = knob(
        None, "Jinja file used instead of the tokenizer's chat template.", group="model"
    )
    trust_remote_code: bool = knob(False, "Run code that a hub repository carries.", group="model")
    lora_r: int = knob(0, "Rank of LoRA adapters; 0: train all weights.", group="model")
    lora_alpha: float | None = knob(
        None,
        "LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r. Default: 16, or that of the LoRA that "
        "training goes on with.",
        group="model",
    )
    lora_dropout: float | None = knob(
        None, "Dropout before the adapters. Default: 0, or that of the LoRA that training goes on with.", group="model"
    )
    lora_target_modules: list[str] | None = knob(
        None,
        "Modules to adapt, by name. Default: every linear layer, or those of the LoRA that training goes on with.",
        group="model",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "lora_r", low=0)
        check_range(self, "lora_alpha", low=0, open_low=True)
        check_range(self, "lora_dropout", low=0, high=1, open_high=True)
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if not self.lora_r and getattr(self, name) is not None:
                raise ValueError(f"{name} needs lora_r, the rank of the adapters; it is 0, which trains all weights")
        check_template(self)
        if self.lora_r and find_spec("peft") is None:
            raise ValueError("lora_r needs the package peft: pip install 'wrpo[peft]'")


def check_template(settings: Any) -> None:
    """Raises ValueError where `chat_template` is no word for a template, or one of two."""
    if settings.chat_template not in (None, "none"):
        todo = "A template of your own goes into a file: chat_template_file"
        raise ValueError(f"chat_template: expected none, got {settings.chat_template!r}. {todo}")
    if settings.chat_template and settings.chat_template_file:
        raise ValueError(f"chat_template: none, beside chat_template_file {settings.chat_template_file!r}; keep one")
