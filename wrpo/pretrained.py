"""The model and the tokenizer that the settings name, and their memory."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .settings import ModelSettings, SettingsError

logger = logging.getLogger("wrpo")

# `chat_template: none`: prompt, answer, end of sequence; as a template it is saved with the model, and everything that
# asks the model goes by it. The tokenizer's own beginning of sequence stands in front where it would put one.
PLAIN = (
    "{% for message in messages %}{% if loop.index > 2 or (message.role == 'assistant') != (loop.index == 2) %}"
    "{{ raise_exception('chat_template none takes one message and its answer') }}{% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN_WITH_START = "{% if not messages[0].content.startswith(bos_token) %}{{ bos_token }}{% endif %}" + PLAIN


def load_tokenizer(settings: ModelSettings, field: str = "model_name_or_path") -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token and, where the settings name one, another chat template.

    field: the setting that the user gave the name in, for the message.

    Raises:
        SettingsError: nothing to load there, a template file that is no text, or `chat_template: none` for a tokenizer
            without an end-of-sequence token.  FileNotFoundError: no such template file.
    """
    tokenizer = _load(AutoTokenizer, settings, field)
    if settings.chat_template_file:
        tokenizer.chat_template = _template(Path(settings.chat_template_file))
    if settings.chat_template == "none":
        tokenizer.chat_template = plain_template(tokenizer, f"{field} {settings.model_name_or_path!r}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any id serves
    return tokenizer


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise SettingsError(f"chat_template_file: expected a Jinja file in UTF-8, got {path}: {error}") from error


def plain_template(tokenizer: Any, place: str = "tokenizer") -> str:
    """The chat template that writes prompt, answer and end of sequence, and nothing else.

    Raises:
        SettingsError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token is None:
        raise SettingsError(
            f"{place}: chat_template none needs an eos_token to end an answer, and the tokenizer has none"
        )
    starts = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return PLAIN_WITH_START if starts else PLAIN


def require_template(tokenizer: Any, settings: ModelSettings) -> None:
    """Raises SettingsError for a tokenizer without a chat template: nobody could ask the model as it was trained."""
    if not tokenizer.chat_template:
        raise SettingsError(
            f"model_name_or_path {settings.model_name_or_path!r}: expected a chat template, its tokenizer has none. "
            "Name one with chat_template_file, or set chat_template to none: prompt and answer as they are"
        )


def load_model(settings: ModelSettings, field: str = "model_name_or_path") -> Any:
    """The causal language model, with fresh LoRA adapters if `lora_r` > 0.

    field: as for `load_tokenizer`.

    Raises:
        SettingsError: nothing to load there, or a module to adapt that the model does not have.
    """
    dtype = "auto" if settings.torch_dtype == "auto" else getattr(torch, settings.torch_dtype)
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Plain tensors; without it some releases keep them packed, or call them quantised and refuse to train them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _load(AutoModelForCausalLM, settings, field, dtype=dtype, **options)
    return _with_adapters(model, settings) if settings.lora_r else model


def warn_of_coarse_weights(model: Any) -> None:
    """Before training: that steps of full fine-tuning would be lost in weights of 16 bits."""
    coarse = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if coarse and not hasattr(model, "peft_config"):
        logger.warning(
            "The weights are %s: steps smaller than about 1/256 of a weight are rounded away. "
            "Full fine-tuning wants torch_dtype: float32 with bf16: true.",
            coarse.pop(),
        )


def free_memory() -> None:
    """Give back what nothing refers to; models lie in cycles of references, which only the collector ends."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _load(auto: Any, settings: ModelSettings, field: str, **options: Any) -> Any:
    name = settings.model_name_or_path
    if settings.gguf_file is not None:
        options["gguf_file"] = settings.gguf_file
    try:
        return auto.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise SettingsError(f"{field} {name!r}: {' '.join(str(error).split())}") from error


def _with_adapters(model: Any, settings: ModelSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    _check_targets(model, settings.lora_target_modules or [])
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _check_targets(model: Any, targets: list[str]) -> None:
    """PEFT leaves out what it does not find, as long as it finds one."""
    paths = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            linear = {
                n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)
            }
            raise SettingsError(
                f"lora_target_modules: no module of the model is named {target!r}; its linear layers are "
                f"{', '.join(sorted(linear))}. Leave it out to adapt them all"
            )
