"""Registers the kernel of an op with its derivative, and gives the way by which Python calls it.

`register_autograd` of torch does the same, and re-reads the whole schema for every argument of every call: 60 us
for our 14 arguments, as much as everything else at toy sizes (torch 2.13, 2026-11-23). Our schemas have no default
values and no keyword-only arguments, so nothing of that is needed.

Nor is the dispatcher, where nobody listens to it: boxing 26 arguments and unboxing them, once above and once below
autograd, costs more than the arithmetic of a toy. A plain eager call goes from autograd straight to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd import forward_ad
from torch.compiler import is_compiling

_library = torch.library.Library("wrpo", "FRAGMENT")
PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def is_plain(tensors: tuple) -> bool:
    """Whether a call is eager and of ordinary tensors: no compiler, trace, transform or mode wants to see the op."""
    if is_compiling():
        return False
    listens = (
        _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    )
    return not listens and PLAIN.issuperset(map(type, tensors))


def owns_saved(ctx) -> bool:
    """Whether what a plain call has saved is needed by nobody after the running backward."""
    return ctx.is_plain and not is_compiling() and not _get_current_graph_task_keep_graph()


def _op(name: str) -> tuple[torch._ops.OpOverload, int]:
    """The op, and how many of its arguments are tensors: the first ones."""
    op = getattr(torch.ops.wrpo, name).default
    return op, sum("Tensor" in str(argument.type) for argument in op._schema.arguments)


def register_kernel(name: str, kernel: Callable) -> Callable:
    """Registers `kernel` on every device; returns what Python calls instead of the op, where no gradient is asked."""
    torch.library.impl(f"wrpo::{name}", "CompositeExplicitAutograd", kernel)
    op, tensors = _op(name)

    def call(*inputs):
        return kernel(*inputs) if is_plain(inputs[:tensors]) else op(*inputs)

    return call


def register_differentiable(name: str, kernel: Callable, save: Callable, backward: Callable) -> Callable:
    """The same with a derivative.

    `save(ctx, inputs, outputs)` runs after the forward; `backward(ctx, *grads)` returns one gradient a tensor among
    the inputs. Where the kernel leaves an output None the op, whose outputs are tensors, returns an empty one.
    """

    def complete(*inputs):
        return tuple([inputs[0].new_empty(0) if x is None else x for x in kernel(*inputs)])

    torch.library.impl(f"wrpo::{name}", "CompositeExplicitAutograd", complete)
    op, tensors = _op(name)

    def below_autograd(keyset: torch._C.DispatchKeySet | None, *inputs) -> tuple[Tensor, ...]:
        if keyset is None:
            return kernel(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, options, *tensors):
            inputs = tensors + options
            outputs = below_autograd(keyset, *inputs)
            ctx.is_plain = keyset is None
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
            return (None, None, *backward(ctx, *grads))

    def differentiable(keyset: torch._C.DispatchKeySet | None, *inputs):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:tensors]):
            apply = plain_apply if keyset is None else Formula.apply
            return apply(keyset, inputs[tensors:], *inputs[:tensors])
        return below_autograd(keyset, *inputs)

    def dispatched(keyset: torch._C.DispatchKeySet, *inputs):
        if forward_ad._current_level >= 0 and any(has_tangent(x) for x in inputs):
            raise NotImplementedError(f"wrpo::{name} has no forward-mode derivative; use backward()")
        return differentiable(keyset, *inputs)

    def call(*inputs):
        return differentiable(None, *inputs) if is_plain(inputs[:tensors]) else op(*inputs)

    # Past the `apply` in Python, which unwraps the tensors of transforms: 8 us that a plain call has no use for.
    plain_apply = super(torch.autograd.Function, Formula).apply
    Formula.__name__ = f"wrpo_{name}"
    _library.impl(name, dispatched, "Autograd", with_keyset=True)
    return call
