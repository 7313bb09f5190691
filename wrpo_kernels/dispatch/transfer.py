"""Numbers that the host has, on their way to a device that it does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: list | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy through pinned memory: from any other the transfer waits for all work that was queued before it."""
    at = values.device if isinstance(values, Tensor) else "cpu"  # a list must not land on the default device
    on_host = torch.as_tensor(values, dtype=dtype, device=at)
    if device.type == "cpu" or on_host.device.type != "cpu":
        return on_host.to(device)
    if device.type == "cuda" and not torch.compiler.is_compiling():  # a compiler has no fake of pin_memory to trace
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)
