"""A checkpoint of transformers, each of whose parameters was in its files.

transformers fills what a checkpoint lacks with random numbers, and says so in a table. Here that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from wrpo.settings import ModelSettings, SettingsError

logger = logging.getLogger("wrpo")

LONGEST = 300  # characters of another program's words in a message: transformers lists all architectures it knows


def load_checkpoint(auto: Any, settings: ModelSettings, field: str) -> Any:
    """The model, in evaluation mode.

    Args:
        auto: class of transformers, e.g. `AutoModelForCausalLM`.
        settings: name, type of the weights, attention, GGUF file, and whether code of the repository may run.
        field: the setting that the user gave the name in, for messages.

    Raises:
        SettingsError: nothing to load there, another kind of model, or a parameter that is not in its files or has
            another shape there. Tied weights that are there once, and buffers, need not be.
    """
    dtype = "auto" if settings.torch_dtype == "auto" else getattr(torch, settings.torch_dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # Plain tensors; without it some releases keep them packed, or call them quantised and refuse to train them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _without_table():
        model, report = from_pretrained(
            auto, settings, field, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _refuse_random(model, report, f"{field} {settings.model_name_or_path!r}")
    return model


def from_pretrained(auto: Any, settings: ModelSettings, field: str, **options: Any) -> Any:
    """What `auto.from_pretrained` gives.

    Raises:
        SettingsError: whatever else it raises, in one line: files and code of other people fail in many ways.
    """
    name = settings.model_name_or_path
    refuse_file(name, field)
    if settings.gguf_file is not None:
        options["gguf_file"] = settings.gguf_file
    try:
        return auto.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        absent = "" if Path(name).exists() else "no such folder here, and as a name on the hub: "
        raise SettingsError(f"{field} {name!r}: {absent}{_words(auto, error)}{_gguf_in(settings)}") from error


def refuse_file(name: str, field: str) -> None:
    """Raises SettingsError where a file of weights is named and not its folder."""
    if Path(name).is_file():
        how = f"; and the file in gguf_file: {Path(name).name}" if name.endswith(".gguf") else ""
        raise SettingsError(
            f"{field} {name!r}: expected a folder or a name on the hub, got a file. Name its folder{how}"
        )


def _gguf_in(settings: ModelSettings) -> str:
    """What to do in a folder of GGUF files, of which none was named."""
    found = sorted(path.name for path in Path(settings.model_name_or_path).glob("*.gguf"))
    return f". It holds {found[0]}: name it in gguf_file" if found and settings.gguf_file is None else ""


def _words(auto: Any, error: Exception) -> str:
    words = " ".join(str(error).split())
    if words.startswith("Unrecognized configuration class"):
        config = words.partition("class '")[2].partition("'")[0].rpartition(".")[2] or "its configuration"
        return f"{config} is of no model that {auto.__name__} knows; expected another architecture"
    words = f"{words[:LONGEST]} ..." if len(words) > LONGEST else words
    return words if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {words}"


@contextmanager
def _without_table() -> Iterator[None]:
    """Its facts are in the one line that follows."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_no_table(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_no_table)
    try:
        yield
    finally:
        log.removeFilter(is_no_table)


def _refuse_random(model: Any, report: dict[str, Any], place: str) -> None:
    if shapes := sorted(report["mismatched_keys"]):
        name, there, here = shapes[0]
        raise SettingsError(
            f"{place}: {name} is {list(there)} in its files and {list(here)} by its config, and {len(shapes) - 1} more "
            "weights have other shapes. Take files and config of one model"
        )
    unused = sorted(report["unexpected_keys"])
    if lacking := not_loaded(model, report["missing_keys"]):
        total = sum(1 for _ in model.parameters())
        raise SettingsError(
            f"{place}: no trained weights for {lacking[0]} ({len(lacking)} of {total} parameters): they would be "
            f"random. {_todo(lacking[0], unused)}"
        )
    if unused:
        logger.warning("%s: %d of its weights have no place in the model, the first: %s", place, len(unused), unused[0])


def not_loaded(model: Any, missing: Any) -> list[str]:
    """Of the names that a checkpoint lacks, those of parameters that it has under no other name (tied weights)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    return [name for name in sorted(missing) if name in parameters and id(parameters[name]) not in loaded]


def _todo(name: str, unused: list[str]) -> str:
    """What to do, also where the files have the name behind that of a wrapper whose state dict was saved."""
    prefix = next((other.removesuffix(name) for other in unused if other.endswith(f".{name}")), None)
    if prefix:
        return f"The files have {prefix}{name}: take {prefix!r} off the names in them"
    return "Name a model that was trained and saved for this"
