"""What an output head multiplies the hidden states with: weight [V, D] and bias [V], and the adapter that is on it.

A LoRA of rank r on the head is one more product, not a changed weight:

    h W^T + s dropout(h) A^T B^T  =  h W^T + low up^T          low = s dropout(h) A^T [..., r], up = B [V, r]

In bfloat16 the sum W + s B A would round the adapter away wherever it is below 1/256 of W; side by side both keep their
own precision, and dropout stays exact. Several active adapters are several more columns of low and up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HeadOperands(NamedTuple):
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    adapter: tuple[Tensor, Tensor] | None = None  # low [..., r], up [V, r]

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., V] in the type of the hidden states, without bias."""
        scores = hidden @ self.weight.to(hidden.dtype).t()
        if self.adapter is None:
            return scores
        low, up = (operand.to(hidden.dtype) for operand in self.adapter)
        return scores + low @ up.t()


def head_operands(head: nn.Module, hidden: Tensor) -> HeadOperands:
    """Of z = hidden weight^T + low up^T + bias, differentiable.

    Raises:
        TypeError: a head, or an adapter on it, of a kind that is not known; the message names it.
        ValueError: the weight is not there in full (sharded, quantised).
    """
    if kind_of(head).__module__.startswith("peft."):
        return _adapted(head, hidden)
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the output head must be torch.nn.Linear, got {type(head).__name__}")
    return HeadOperands(_whole(head.weight), head.bias)


def kind_of(module: nn.Module) -> type:
    """The module's class. FSDP2 gives a module that it shards another one, derived from FSDPModule and that."""
    kind, base, *bases = type(module).__mro__
    return bases[0] if base.__module__ == "torch.distributed.fsdp" else kind


def _whole(weight: Tensor) -> Tensor:
    if hasattr(weight, "full_tensor"):  # DTensor
        raise ValueError("the output head is a DTensor when it runs; tensor parallelism of the head is not supported")
    if not weight.is_floating_point():
        raise ValueError(f"the output head is quantised to {weight.dtype}; keep it in a floating type")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"the output head's weight is {list(weight.shape)} when it runs, expected [V, D]")
    return weight


def _adapted(head: Any, hidden: Tensor) -> HeadOperands:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper

    kind = kind_of(head)
    if kind is ModulesToSaveWrapper:
        active = [] if head.disable_adapters else head.active_adapters
        return head_operands(head.modules_to_save[active[0]] if active else head.original_module, hidden)
    if kind is LoraLinear:
        return _with_lora(head, hidden)
    raise TypeError(f"{kind.__module__}.{kind.__name__} on the output head is not known; use LoRA, "
                    "modules_to_save, or leave the head without an adapter")  # fmt: skip


def _with_lora(head: Any, hidden: Tensor) -> HeadOperands:
    plain = head_operands(head.get_base_layer(), hidden)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward would
    active = [] if head.disable_adapters or head.merged else [n for n in head.active_adapters if n in head.lora_A]
    if not active:
        return plain
    low, up = [], []
    for name in active:
        variant = getattr(head, "lora_variant", {}).get(name)
        if variant is not None or getattr(head.lora_B[name], "bias", None) is not None:
            kind = "lora_bias" if variant is None else getattr(variant, "__name__", type(variant).__name__)
            raise TypeError(f"adapter {name!r} on the output head uses {kind}; only plain LoRA is known there")
        down = head.lora_A[name]
        if hasattr(down, "_fsdp_wrapped_module"):
            raise ValueError(
                f"adapter {name!r} on the output head: FSDP1 gathers it apart from the head. Take FSDP2 (fsdp_version: "
                "2), or leave the head without an adapter"
            )
        low.append(down(head.lora_dropout[name](hidden.to(down.weight.dtype))) * head.scaling[name])
        up.append(_whole(head.lora_B[name].weight))
    return plain._replace(adapter=(torch.cat(low, -1), torch.cat(up, 1)))
