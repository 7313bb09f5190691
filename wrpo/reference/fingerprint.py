"""What reference log-probs are made from besides the data, in a few hashes.

Every byte of every parameter counts: a model that differs in one token's row gives other log-probs. One pass over the
weights at the speed of memory: SmolLM2-135M in float32 0.1 s, 1.5e9 parameters in bfloat16 0.4 s (Zen 3,
2 cores, 2026-11-30).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from wrpo.head.operands import kind_of

NOT_ARITHMETIC = ("_name_or_path", "transformers_version", "use_cache")  # config fields that change no number
NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")  # of PEFT's config
ZERO_AT_FIRST = (".lora_B.", ".lora_embedding_A.")  # of PEFT's LoRA
PIECE = 64 << 20  # bytes of a parameter that are on the CPU at a time


def model_fingerprint(model: Any, tokenizer: Any, settings: dict[str, Any]) -> dict[str, str]:
    """Hashes under "model", "tokenizer" and "settings".

    Args:
        model: of transformers, with adapters of PEFT or without. Weights that are spread over ranks (DTensor, ZeRO-3)
            are gathered one at a time, so that the hash does not depend on their number; every rank must call it.
        tokenizer: its template and vocabulary count. None: nothing.
        settings: what else decides the numbers, as JSON can hold it.
    """
    return {
        "model": _of_model(model),
        "tokenizer": _of_tokenizer(tokenizer),
        "settings": json.dumps(settings, sort_keys=True),
    }


def start_fingerprint(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a run begins with, in parts that say which of them another run has otherwise. Every rank must call it.

    Returns:
        "trained": a hash of the names and shapes of the parameters that are trained; "model": of the weights, under an
        adapter of those that are frozen; "adapter": of the adapter's weights, "fresh" where they change no number yet;
        "tokenizer": a hash; "config.*" and "adapter.*": the fields of the model's and the adapter's configurations.
    """
    weights = sorted(model.state_dict(keep_vars=True).items())
    is_adapted = bool(getattr(model, "peft_config", None))
    trained = [(name, value) for name, value in weights if getattr(value, "requires_grad", False)]
    of_adapter = {name for name, _ in trained} if is_adapted else set()
    shapes = xxh3_128("".join(_described(name, value) for name, value in trained).encode())
    return {
        "trained": shapes.hexdigest(),
        "model": _hash((name, value) for name, value in weights if name not in of_adapter),
        "adapter": _of_adapter(trained) if is_adapted else None,
        "tokenizer": _of_tokenizer(tokenizer),
        **{f"config.{name}": value for name, value in _config_of(model).items()},
        **{f"adapter.{name}": value for fields in _adapters_of(model).values() for name, value in fields.items()},
    }


def _of_tokenizer(tokenizer: Any) -> str:
    words = [] if tokenizer is None else [tokenizer.chat_template, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _of_model(model: Any) -> str:
    active = getattr(model, "active_adapters", None) if hasattr(model, "disable_adapter") else None
    parts = [kind_of(model).__name__, _config_of(model), _adapters_of(model), active]
    digest = xxh3_128(json.dumps(parts, sort_keys=True, default=_as_json).encode())
    return _hash(sorted(model.state_dict(keep_vars=True).items()), digest)


def _config_of(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in NOT_ARITHMETIC}


def _adapters_of(model: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {field: value for field, value in adapter.to_dict().items() if field not in NOT_OF_ADAPTERS}
        for name, adapter in getattr(model, "peft_config", {}).items()
    }


def _of_adapter(weights: list[tuple[str, Any]]) -> str:
    """LoRA begins with one random matrix and one of zeros: until that is trained, the other changes nothing."""
    zeros = [value for name, value in weights if any(part in name for part in ZERO_AT_FIRST)]
    others = [name for name, _ in weights if ".lora_" not in name]
    return "fresh" if zeros and not others and all(map(_is_zero, zeros)) else _hash(weights)


def _is_zero(value: Any) -> bool:
    return not any(isinstance(piece, bytes) or piece.any() for piece in _bytes_of(value))


def _hash(weights: Iterable[tuple[str, Any]], digest: Any = None) -> str:
    digest = xxh3_128() if digest is None else digest
    for name, value in weights:
        digest.update(_described(name, value).encode())
        for piece in _bytes_of(value):
            digest.update(piece)
    return digest.hexdigest()


def _described(name: str, value: Any) -> str:
    shape = getattr(value, "ds_shape", getattr(value, "shape", ()))
    return f"{name} {tuple(shape)} {getattr(value, 'dtype', '')}"


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _bytes_of(value: Any) -> Iterator[Any]:
    if not isinstance(value, Tensor):  # the extra state of a module
        yield repr(value).encode()
        return
    if value.is_meta:  # no weights here, but on another process
        yield b"meta"
        return
    with _gathered(value):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # DTensor
        for piece in whole.detach().reshape(-1).view(torch.uint8).split(PIECE):
            yield piece.cpu().numpy()


def _gathered(value: Tensor) -> AbstractContextManager:
    """While it lasts, a parameter that ZeRO-3 has emptied is there."""
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def refuse_unequal(fingerprints: list[dict[str, str]], *, but: str | None = None) -> None:
    """Raises ValueError where a process has made its fingerprint from something else than the first one.

    but: what may differ. Default: None, nothing.
    """
    first = fingerprints[0]
    for rank, other in enumerate(fingerprints):
        if changed := [name for name in first if other[name] != first[name] and name != but]:
            raise ValueError(
                f"process {rank} has another {', '.join(changed)} than process 0, and each would compute a part of the "
                "reference log-probs: load the same weights and data everywhere (fsdp_cpu_ram_efficient_loading: false)"
            )
