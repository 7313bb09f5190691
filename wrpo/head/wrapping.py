"""What FSDP and DeepSpeed will do to a model, known before they do it."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether the model cannot run before it is wrapped: ZeRO-3 empties its weights, on `meta` they never were."""
    return any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters())


def arithmetic_of_wrapper(accelerator: Any) -> str | None:
    """In words, where the wrapped model rounds otherwise, or is in shards; None: it runs as it does now."""
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        return f"FSDP {accelerator.state.fsdp_plugin.mixed_precision_policy}"
    return kind if kind == "DEEPSPEED" else None


def takes_weights_of_first_process(accelerator: Any) -> bool:
    """Whether wrapping hands the weights of the first process to all others, whatever these have loaded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)
