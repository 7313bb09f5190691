"""What FSDP and DeepSpeed will do to a model, known before they do it."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether the model cannot run before it is wrapped: ZeRO-3 empties its weights, on `meta` they never were."""
    return any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters())


def runs_otherwise_when_wrapped(accelerator: Any) -> bool:
    """Whether the wrapped model rounds otherwise (FSDP's and DeepSpeed's own mixed precision), or is in shards."""
    return accelerator.distributed_type.value in ("FSDP", "DEEPSPEED")


def takes_weights_of_first_process(accelerator: Any) -> bool:
    """Whether wrapping hands the weights of the first process to all others, whatever these have loaded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)
