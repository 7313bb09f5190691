"""Registers the derivative of an op.

`torch.library.register_autograd` does the same, and re-reads the whole schema for every argument of every call: 60 us
for our 14 arguments, as much as everything else at toy sizes (torch 2.13, 2026-11-23). Our schemas have no default
values and no keyword-only arguments, so nothing of that is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("wrpo", "FRAGMENT")


def has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def register_autograd(name: str, save: Callable, backward: Callable) -> None:
    """`save(ctx, inputs, outputs)` runs after the forward; `backward(ctx, *grads)` returns one gradient an input."""
    op = getattr(torch.ops.wrpo, name).default

    def below_autograd(keyset: torch._C.DispatchKeySet, inputs: tuple) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *inputs):
            outputs = below_autograd(keyset, inputs)
            # Zeros for the outputs without a gradient would cost a pass over each.
            ctx.set_materialize_grads(False)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if torch.is_grad_enabled():  # in a backward that is with create_graph only
                raise RuntimeError(f"wrpo::{name} has one derivative; it cannot be differentiated twice (create_graph)")
            if grads[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            return (None, *backward(ctx, *grads))

    def kernel(keyset: torch._C.DispatchKeySet, *inputs):
        if forward_ad._current_level >= 0 and any(has_tangent(x) for x in inputs):
            raise NotImplementedError(f"wrpo::{name} has no forward-mode derivative; use backward()")
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Formula.apply(keyset, *inputs)
        return below_autograd(keyset, inputs)

    Formula.__name__ = f"wrpo_{name}"
    _library.impl(name, kernel, "Autograd", with_keyset=True)
