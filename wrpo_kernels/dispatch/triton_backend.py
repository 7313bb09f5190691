"""When the Triton implementation of an op runs, and that Triton is imported only then.

Importing Triton takes about as long as importing torch, so among its candidates an op lists
`TritonBackend("wrpo_kernels.<op>.triton_kernel")`; the module behind it is imported by the first call that it does not
refuse.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability; what Triton itself still supports


class TritonBackend:
    """Stands for a module of Triton kernels without importing it."""

    NAME = "triton"

    def __init__(self, module: str) -> None:
        self._module = module

    def refuses(self, tensor: Tensor) -> str | None:
        return refuses(tensor)

    def waits_to_be_named(self, tensor: Tensor) -> str | None:
        if tensor.device.type == "cpu":
            return "the interpreter is for tests; it runs when backend='triton' asks for it"
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._module), name)


class FusedTritonBackend(TritonBackend):
    """The matrix product that writes no logits: slower than the chunked passes, so it waits for its name."""

    NAME = "triton_fused"

    def waits_to_be_named(self, tensor: Tensor) -> str | None:
        return "the chunked passes are faster; backend='triton_fused' asks for it"


def refuses(tensor: Tensor) -> str | None:
    """Why no Triton kernel can work on this tensor."""
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        return f"runs on cuda tensors, got {tensor.device}"
    if kind == "cpu" and not is_interpreted():
        return (
            f"runs on cuda tensors, got {tensor.device} (there only with TRITON_INTERPRET=1 set before Python starts)"
        )
    if tensor.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {tensor.dtype}"
    return missing() or (None if kind == "cpu" or is_interpreted() else _refuses_device(tensor.device.index))


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed; CUDA builds of torch bring it"


@cache
def _refuses_device(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST:
        return None
    return (
        f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, cuda:{index} has {capability[0]}.{capability[1]}"
    )


@cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
