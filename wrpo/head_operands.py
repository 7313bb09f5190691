"""What an output head multiplies: hidden states [..., D], weight [V, D] and bias [V], whatever adapter is on it.

A LoRA of rank r on the head is a longer product, not a changed weight:

    h W^T + s dropout(h) A^T B^T  =  [h, s dropout(h) A^T] [W, B]^T          [..., D + r] times [V, D + r]

In bfloat16 the sum W + s B A would round the adapter away wherever it is below 1/256 of W; side by side both keep their
own precision, and dropout stays exact. Several active adapters are several more columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def head_operands(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias of z = hidden weight^T + bias, differentiable.

    Raises:
        TypeError: a head, or an adapter on it, of a kind that is not known; the message names it.
        ValueError: the weight is not there in full (sharded, quantised).
    """
    if type(head).__module__.startswith("peft."):
        return _adapted(head, hidden)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the output head must be torch.nn.Linear, got {type(head).__name__}")
    return hidden, _whole(head.weight), head.bias


def _whole(weight: Tensor) -> Tensor:
    if hasattr(weight, "full_tensor"):  # DTensor
        raise ValueError("the output head is a DTensor when it runs; tensor parallelism of the head is not supported")
    if not weight.is_floating_point():
        raise ValueError(f"the output head is quantised to {weight.dtype}; keep it in a floating type")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"the output head's weight is {list(weight.shape)} when it runs, expected [V, D]; under ZeRO-3 an adapter "
            "on the head is not supported"
        )
    return weight


def _adapted(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper

    if type(head) is ModulesToSaveWrapper:
        active = [] if head.disable_adapters else head.active_adapters
        return head_operands(head.modules_to_save[active[0]] if active else head.original_module, hidden)
    if type(head) is LoraLinear:
        return _with_lora(head, hidden)
    raise TypeError(f"{type(head).__module__}.{type(head).__name__} on the output head is not known; use LoRA, "
                    "modules_to_save, or leave the head without an adapter")  # fmt: skip


def _with_lora(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    plain, weight, bias = head_operands(head.get_base_layer(), hidden)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward would
    active = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in head.lora_A]
    if not active:
        return plain, weight, bias
    columns, weights = [plain], [weight.to(hidden.dtype)]
    for name in active:
        variant = getattr(head, "lora_variant", {}).get(name)
        if variant is not None or getattr(head.lora_B[name], "bias", None) is not None:
            kind = "lora_bias" if variant is None else getattr(variant, "__name__", type(variant).__name__)
            raise TypeError(f"adapter {name!r} on the output head uses {kind}; only plain LoRA is known there")
        down = head.lora_A[name]
        low = down(head.lora_dropout[name](hidden.to(down.weight.dtype))) * head.scaling[name]  # [..., r]
        columns.append(low.to(hidden.dtype))
        weights.append(_whole(head.lora_B[name].weight).to(hidden.dtype))
    return torch.cat(columns, -1), torch.cat(weights, 1), bias
