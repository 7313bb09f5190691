"""Registers an op with torch: schema, kernel, fake and derivative; and gives the way by which Python calls it.

torch's own way from Python to an op and its derivative costs half a toy step: it reads the schema again for every
argument and boxes some 28 of them, above and below autograd (1.40 and 1.56 times plain torch, where the way past it
takes 0.99 and 1.01; 2026-11-30, see docs/log.md). So an eager call of ordinary tensors, which no compiler, trace,
transform or mode wants to see, goes straight to the kernel. Two private names of torch tell whether a transform or a
mode does; where torch has one of them no longer, every call takes torch's way. Two more tell whether a backward may
write where the forward has saved; without one of them it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from wrpo_kernels.dispatch.schema import Arguments

PLAIN = {Tensor, torch.nn.Parameter, type(None)}

# Private names of torch; None where it has no such name.
number_of_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
has_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call is eager and of ordinary tensors, and nobody but autograd wants to see the op."""
    if is_compiling() or number_of_modes is None or has_transforms is None:
        return False
    if number_of_modes() or has_transforms() or torch.jit.is_tracing() or not PLAIN.issuperset(map(type, tensors)):
        return False
    # Their memory must hold the values: a view may stand for their negative, meta tensors have none.
    return not [x for x in tensors if x is not None and (x.is_neg() or x.is_meta)]


def owns_saved(ctx: Any) -> bool:
    """Whether what an eager call has saved is needed by nobody after the running backward; False where unknown.

    Hooks on what is saved (`torch.autograd.graph.saved_tensors_hooks`) may keep it.
    """
    has_saved_alone = getattr(ctx, "has_saved_alone", False) and not is_compiling()
    return has_saved_alone and keeps_graph is not None and not keeps_graph()


def register(
    name: str,
    takes: Arguments,
    returns: str,
    *,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers an op without a derivative, for every device; returns what Python calls instead of it.

    That takes its arguments grouped, as `check`, `kernel` and `fake` do. `check` raises for shapes and types that the
    kernel would not survive, wherever torch calls the op: compiled code, an exported program or a raw call have passed
    no door. An eager call has.
    """
    op = _define(name, takes, returns, check, kernel, fake)

    def call(*groups: Any) -> Any:
        flat = takes.flat(groups)
        return kernel(*groups) if is_plain(flat[: takes.tensors]) else op(*flat)

    return call


def register_differentiable(
    name: str,
    takes: Arguments,
    returns: str,
    *,
    check: Callable[..., None],
    kernel: Callable[..., tuple[Tensor | None, ...]],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Mapping[str, Tensor | None]],
) -> Callable[..., Any]:
    """The same with a derivative.

    `save(ctx, outputs, *groups)` runs after the forward; `backward(ctx, *grads)` returns gradients by the names of the
    arguments. Where the kernel leaves an output None the op, whose outputs are tensors, returns an empty one.
    """

    def set_up(ctx: Any, inputs: Sequence[Any], output: tuple) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, output, *takes.grouped(inputs))

    op = _define(name, takes, returns, check, _complete(takes, kernel), fake)
    library.register_autograd(f"wrpo::{name}", _derivative(name, takes.names, backward), setup_context=set_up)
    eager = _eager(name, kernel, save, _derivative(name, takes.names[: takes.tensors], backward))

    def call(*groups: Any) -> Any:
        flat = takes.flat(groups)
        tensors = flat[: takes.tensors]
        if is_plain(tensors):
            return eager.apply(groups, *tensors)
        if not is_compiling() and any(_has_tangent(x) for x in tensors):
            _refuse_tangents(name)
        return op(*flat)

    return call


def _complete(takes: Arguments, kernel: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple]:
    """`kernel` as torch calls it: an output that it leaves None is an empty tensor."""

    def complete(*groups: Any) -> tuple[Tensor, ...]:
        first, *_ = takes.flat(groups)
        return tuple([first.new_empty(0) if x is None else x for x in kernel(*groups)])

    return complete


def _derivative(name: str, arguments: list[str], backward: Callable[..., Mapping[str, Tensor | None]]) -> Callable:
    """`backward` as autograd calls it: one gradient an argument, in their order."""

    def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # in a backward that is with create_graph only
            raise RuntimeError(f"wrpo::{name} has one derivative; it cannot be differentiated twice (create_graph)")
        found = {} if grads[0] is None else backward(ctx, *grads)
        return tuple([found.get(argument) for argument in arguments])

    return derivative


def _eager(name: str, kernel: Callable[..., tuple], save: Callable, derivative: Callable) -> Any:
    """Kernel and derivative as a `torch.autograd.Function` of the groups and, once more, of the tensors in them."""

    def forward(ctx: Any, groups: tuple, *_tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.has_saved_alone = saving_hooks is not None and saving_hooks(True) is None
        ctx.set_materialize_grads(False)  # zeros for the outputs without a gradient would cost a pass over each
        outputs = kernel(*groups)
        save(ctx, outputs, *groups)
        return outputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *derivative(ctx, *grads)

    def jvp(ctx: Any, *_tangents: Any) -> None:
        _refuse_tangents(name)

    # Made by name, so that a profiler and `print(loss)` tell which op it is.
    functions = {function.__name__: staticmethod(function) for function in (forward, backward, jvp)}
    return type(f"wrpo_{name}_", (torch.autograd.Function,), functions)


def _define(
    name: str,
    takes: Arguments,
    returns: str,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            groups = takes.grouped(inputs)
            check(*groups)
            return function(*groups)

        return call

    full_name = f"wrpo::{name}"
    library.define(full_name, f"({takes.schema}) -> ({returns})")
    library.impl(full_name, "CompositeExplicitAutograd", checked(kernel))
    library.register_fake(full_name, checked(fake))
    return getattr(torch.ops.wrpo, name).default


def _refuse_tangents(name: str) -> None:
    raise NotImplementedError(f"wrpo::{name} has no forward-mode derivative; use backward()")


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
