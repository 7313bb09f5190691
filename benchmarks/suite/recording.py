"""Every launch of a call, with its flops and bytes, on tensors that have shapes and no values.

Tensors of the meta device stand for those of a GPU: the CUDA backend is taken, its launches are noted in place of
being queued, and torch's own ops are noted as they pass. Reading a value raises, so a call that is recorded waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wrpo_kernels.dispatch import autograd, cuda_launch
from wrpo_kernels.linear_preference_loss import contract as linear_preference_loss
from wrpo_kernels.linear_token_logp import contract as linear_token_logp
from wrpo_kernels.lm_head import gradients, products, rows, scaling

ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}
# Positions of the two factors among the arguments.
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1)}
GATHERS = {"index_select", "index", "take", "embedding"}  # read as much as they write, of a larger tensor
SCATTERS = {"index_copy_": 3, "index_put_": 2}  # write as much as the argument at this place holds


class Launch(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of what it writes; () of a kernel of ours
    flops: int  # 0: no matrix product
    read: int  # bytes, each tensor once
    written: int

    @property
    def beside(self) -> int:
        """Bytes of a kernel that is no product; of one that adds, the total that it reads and writes again."""
        if not self.flops:
            return self.read + self.written
        return 2 * self.written if self.name.startswith("addmm") else 0


class Recorder(TorchDispatchMode):
    """Notes the launches on the meta device; `mark` begins a phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, list[Launch]] = {}

    def mark(self, phase: str) -> None:
        self._current = self.phases.setdefault(phase, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_there = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs, out)))
        if is_there and not func.is_view and name not in ALLOCATIONS:
            self._current.append(launch_of(name, args, out))
        return out

    def gather_rows(self, _source: Tensor, index: Tensor | None, coef: Tensor | None, out: Tensor) -> None:
        self._scaling("gather_rows", out, out, index, coef)

    def scatter_rows(self, share: Tensor, index: Tensor | None, coef: Tensor, _out: Tensor) -> None:
        self._scaling("scatter_rows", share, share, index, coef)

    def scale(self, total: Tensor, factor: Tensor, out: Tensor) -> None:
        self._scaling("scale", out, total, factor)

    def compact(self, labels: Tensor, _ignore_index: int, index: Tensor, kept: Tensor) -> None:
        sizes = bytes_of(index) + bytes_of(kept)
        self._current.append(Launch("compact", tuple(index.shape), 0, bytes_of(labels), sizes))

    def _scaling(self, name: str, written: Tensor, *read: Tensor | None) -> None:
        """A kernel of `wrpo_kernels.lm_head.scaling_kernel`."""
        sizes = [bytes_of(x) for x in read if x is not None]
        self._current.append(Launch(name, tuple(written.shape), 0, sum(sizes), bytes_of(written)))

    def kernel(self, name: str, _on: Tensor, *arguments: Any) -> None:
        """In place of `cuda_launch.launch`."""
        sizes = [bytes_of(x) for x in arguments if isinstance(x, Tensor)]
        is_in_place = name == "token_logp_delta_"
        self._current.append(Launch(name, (), 0, sum(sizes), sizes[0] if is_in_place else 0))


def launch_of(name: str, args: tuple, out: Any) -> Launch:
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    shape, written = tuple(outputs[0].shape) if outputs else (), sum(map(bytes_of, outputs))
    if name in PRODUCTS:
        a, b = (args[place] for place in PRODUCTS[name])
        return Launch(name, shape, 2 * a.shape[-2] * a.shape[-1] * b.shape[-1], bytes_of(a) + bytes_of(b), written)
    if name in GATHERS:
        index = sum(bytes_of(x) for x in tree_leaves(args[1:]) if isinstance(x, Tensor))
        return Launch(name, shape, 0, index + written, written)
    if name in SCATTERS:
        source = bytes_of(args[SCATTERS[name]])
        return Launch(name, shape, 0, source, source)
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    read = tensors[1:] if name in ("copy_", "zero_", "fill_") else tensors
    return Launch(name, shape, 0, sum(map(bytes_of, read)), written)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


@contextmanager
def recorded() -> Iterator[Recorder]:
    """While it lasts, calls on meta tensors run as on a GPU with the CUDA backend, and are noted."""
    recorder = Recorder()
    recorder.mark("forward")
    in_place_of = [
        (autograd, "is_plain", lambda tensors: True),
        (rows, "is_plain", lambda tensors: False),
        (cuda_launch, "refuses", lambda tensor: None),
        (cuda_launch, "launch", recorder.kernel),
        (scaling, "kernels", lambda tensor: recorder),
        (products, "adds_float32", lambda *facts: True),
        (gradients, "writes_float32", lambda delta: True),
        (linear_preference_loss, "no_autocast", lambda like: nullcontext()),
        (linear_token_logp, "no_autocast", lambda like: nullcontext()),
    ]
    with ExitStack() as stack:
        for module, name, stand_in in in_place_of:
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(recorder)
        yield recorder
