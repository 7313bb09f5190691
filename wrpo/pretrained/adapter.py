"""Adapters of PEFT: fresh ones on a model, and those that lie in a folder, on the model that they were trained on."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    find_adapter_config_file,
)

from wrpo.settings import ModelSettings, SettingsError
from wrpo.user_error import in_one_line

from .checkpoint import not_loaded, refuse_file

OF_LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
           "lora_target_modules": "target_modules"}  # setting: field of adapter_config.json  # fmt: skip
SHAPES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[[^]]*\])\).*?torch\.Size\((\[[^]]*\])\)")  # of torch
WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
MERGE = (
    "To start anew from the adapted model, merge the two: "
    "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
)


class AdapterFolder(NamedTuple):
    """What a folder or repository says about the adapter in it."""

    name: str
    place: str  # for messages
    base: str  # the model that it belongs to
    kind: str  # "LORA", ...
    lora: dict[str, Any]  # lora_r, lora_alpha, ... as settings name them; None where it is no LoRA


def find_adapter(settings: ModelSettings, field: str) -> AdapterFolder | None:
    """The adapter that the settings name; None where they name a whole model.

    Raises:
        SettingsError: an adapter without its model's name, or on another adapter, or beside a whole model.
    """
    name, place = settings.model_name_or_path, f"{field} {settings.model_name_or_path!r}"
    refuse_file(name, field)
    fields = _config_of(name, place)
    if fields is None:
        return None
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise SettingsError(f"{place}: its adapter_config.json names no base_model_name_or_path")
    if any((Path(name) / file).exists() for file in WHOLE_MODEL):
        raise SettingsError(f"{place}: holds a whole model and an adapter. Move one of them to a folder of its own")
    if _config_of(base, place) is not None:
        raise SettingsError(f"{place}: the model of its adapter, {base}, is an adapter itself. {MERGE}")
    if find_spec("peft") is None:
        raise SettingsError(f"{place}: an adapter needs the package peft: pip install 'wrpo[peft]'")
    lora = {field: fields.get(peft) for field, peft in OF_LORA.items()}
    return AdapterFolder(name, place, base, str(fields.get("peft_type")), lora)


def _config_of(name: str, place: str) -> dict | None:
    try:
        path = find_adapter_config_file(name)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        absent = "" if Path(name).exists() else f"no such folder here: {name}. As a name on the hub: "
        raise SettingsError(f"{place}: {absent}{in_one_line(error)}") from error


def put_on(base: Any, adapter: AdapterFolder, *, is_trained: bool) -> Any:
    """The model with the adapter of the folder on it, as PEFT's model, and with the folder's generation settings.

    Args:
        base: the model that the adapter belongs to.
        is_trained: whether it is trained on; frozen otherwise.

    Raises:
        SettingsError: weights that are missing, too many, of another shape, or of a kind of adapter that PEFT does not
            know.
    """
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(adapter.name)
        config.inference_mode = not is_trained
        model = get_peft_model(base, config)
        report = model.load_adapter(adapter.name, "default", is_trainable=is_trained)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        words = _other_shape(str(error), adapter) or in_one_line(error)
        raise SettingsError(f"{adapter.place}, an adapter on {adapter.base}: {words}") from error
    if wrong := sorted([*not_loaded(model, report.missing_keys), *report.unexpected_keys]):
        raise SettingsError(
            f"{adapter.place}: {len(wrong)} weights of the adapter are missing, or have no place on {adapter.base}, "
            f"the first: {wrong[0]}. Take the model that it was trained on"
        )
    try:
        with suppress(OSError):  # where there is none beside the adapter, that of its model holds
            model.get_base_model().generation_config = GenerationConfig.from_pretrained(adapter.name)
    except Exception as error:
        raise SettingsError(f"{adapter.place}: its generation_config.json: {in_one_line(error)}") from error
    return model


def _other_shape(words: str, adapter: AdapterFolder) -> str | None:
    """Both sizes of the first weight that does not fit, from torch's words, and what to do about it."""
    found = SHAPES.search(words)
    if found is None:
        return None
    name, there, here = found.groups()
    if not ("embed" in name or name.endswith("lm_head.weight")):
        return f"{name} is {there} in the adapter, and {here} on this model. Take the model that it was trained on"
    size = there.strip("[]").partition(",")[0]
    return (
        f"{name} is {there} in the adapter, which was saved after resize_token_embeddings, and {here} on this model. "
        f"Merge the two: base = transformers.AutoModelForCausalLM.from_pretrained({adapter.base!r}); "
        f"base.resize_token_embeddings({size}); peft.PeftModel.from_pretrained(base, {adapter.name!r})"
        ".merge_and_unload().save_pretrained(MERGED), and save the tokenizer there"
    )


def check_goes_on(adapter: AdapterFolder, settings: ModelSettings) -> None:
    """Raises SettingsError where the settings ask for other training than that of the adapter that they name."""
    if adapter.kind != "LORA":
        raise SettingsError(f"{adapter.place}: expected a model or a LoRA, got an adapter {adapter.kind}. {MERGE}")
    if not settings.lora_r:
        raise SettingsError(
            f"{adapter.place}: expected a whole model, since lora_r 0 trains all weights, got an adapter. Go on with "
            f"it by lora_r {adapter.lora['lora_r']}. {MERGE}"
        )
    for name, value in adapter.lora.items():
        asked = getattr(settings, name)
        if asked is not None and (set(asked) != set(value or ()) if isinstance(asked, list) else asked != value):
            raise SettingsError(
                f"{name}: expected {value}, that of the adapter in {adapter.name}, which training goes on with, got "
                f"{asked}. {MERGE}"
            )


def put_on_fresh(model: Any, settings: ModelSettings) -> Any:
    """The model with a fresh LoRA.

    Raises:
        SettingsError: a module to adapt that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, settings.lora_target_modules or [])
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=16.0 if settings.lora_alpha is None else settings.lora_alpha,
        lora_dropout=settings.lora_dropout or 0.0,
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
