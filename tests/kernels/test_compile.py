"""The ops as torch sees them: a right schema, fake and derivative, and no graph break under `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from cost import budget_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wrpo_kernels import (
    linear_preference_loss,
    linear_token_logp,
    linear_wrpo_loss,
    preference_loss,
    token_logp,
    wrpo_loss,
)

S, T, D, V, G = 6, 5, 8, 23, 2
SMALL_BUDGET = budget_of(4, V, D, torch.float32)
LARGE = 1024  # a V for which the head is not a small one, with D = 260


def tensors(
    device: torch.device, dtype: torch.dtype = torch.float32, steps: int = T, vocabulary: int = V, width: int = D
):
    """hidden, weight, bias, labels, ref_logp; all that require grad do."""
    labels = torch.randint(0, vocabulary, (S, steps))
    labels[:, 0], labels[2, -1] = -100, -100
    floats = (torch.randn(S, steps, width), torch.randn(vocabulary, width), torch.randn(vocabulary))
    hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in floats)
    return hidden, weight, bias, labels.to(device), -3.0 * steps + torch.randn(S, device=device)


def general(device: torch.device) -> dict:
    weight = torch.tensor([0.3, 1.0, 0.7, -1.0, -0.5, -0.5], device=device)
    return {
        "seq_weight": weight,
        "group": torch.tensor([0, 1, 0, 0, 1, 1], device=device),
        "num_groups": G,
        "beta": 0.1,
    }


def doors(device: torch.device, backend: str, **size) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every public function as one of tensors alone, with tensors to call it on."""
    hidden, weight, bias, labels, ref = tensors(device, **size)
    logits = (hidden @ weight.T).detach().requires_grad_()
    logp = (ref + torch.randn(S, device=device)).requires_grad_()
    head = {"softcap": 20.0, "logit_scale": 0.7, "backend": backend}
    options = general(device)
    adapter = (torch.randn(S, labels.shape[1], 2, device=device), torch.randn(weight.shape[0], 2, device=device))
    low, up = (x.to(hidden.dtype).requires_grad_() for x in adapter)
    packed = (hidden.detach().flatten(0, 1).requires_grad_(), weight, bias, labels.flatten(), ref)
    bounds = torch.arange(0, (S + 1) * labels.shape[1], labels.shape[1], device=device)

    def linear(door, h, w, b, y, r, **rest):
        return door(h, w, y, r, bias=b, **head, **rest).loss

    general_door = partial(linear_preference_loss, **options)
    wrpo_door = partial(linear_wrpo_loss, alpha=0.3)
    given = (hidden, weight, bias, labels, ref)
    return {
        "token_logp": (lambda z, b, y: token_logp(z, y, bias=b, **head), (logits, bias, labels)),
        "linear_token_logp": (lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, **head), given[:4]),
        "linear_token_logp, small budget": (
            lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, budget_bytes=SMALL_BUDGET, **head),
            given[:4],
        ),
        "linear_token_logp, frozen head": (
            lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, **head),
            (hidden, weight.detach(), bias.detach(), labels),
        ),
        "preference_loss": (
            lambda x, r: preference_loss(x, r, nll_weight=0.1, backend=backend, **options).loss,
            (logp, ref),
        ),
        "wrpo_loss": (lambda x, r: wrpo_loss(x, r, alpha=0.3, backend=backend).loss, (logp, ref)),
        "linear_preference_loss": (partial(linear, general_door), given),
        "linear_preference_loss, small budget": (partial(linear, general_door, budget_bytes=SMALL_BUDGET), given),
        "linear_preference_loss, each group": (partial(linear, general_door, reduction="none"), given),
        "linear_preference_loss, packed": (partial(linear, general_door, cu_seqlens=bounds), packed),
        "linear_wrpo_loss": (partial(linear, wrpo_door), given),
        "linear_token_logp, adapter": (
            lambda h, w, low, up, y: linear_token_logp(h, w, y, adapter=(low, up), **head),
            (hidden, weight.detach(), low, up, labels),
        ),
        "linear_preference_loss, adapter, small budget": (
            lambda h, w, low, up, b, y, r: linear(
                general_door, h, w, b, y, r, adapter=(low, up), budget_bytes=SMALL_BUDGET
            ),
            (hidden, weight.detach(), low, up, bias.detach(), labels, ref),
        ),
    }


DOORS = tuple(doors(torch.device("cpu"), "reference"))


def is_second(door: str, backend: str) -> bool:
    """One of two variants, so that every door meets both, on one backend each, and every backend both.

    For what does not depend on the backend, which is a constant of the graph and of the op's arguments.
    """
    return (DOORS.index(door) + ("native", "reference", "triton", "cuda").index(backend)) % 2 == 1


def value_and_gradients(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x for x in given if x.requires_grad]
    value = function(*given)
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value.detach(), *(grad for grad in grads if grad is not None)]


class Recorded(TorchDispatchMode):
    """Notes every op of ours that is called, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "wrpo":
            first = torch._C._current_graph_task_id() == -1  # no derivative of a derivative
            copies = tuple(
                x.detach().clone().requires_grad_(x.requires_grad and first) if isinstance(x, Tensor) else x
                for x in args
            )
            self.calls.setdefault(f"{func._opname}{len(self.calls)}", (func, copies))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("door", DOORS)
def test_every_op_has_a_right_schema_fake_and_derivative(door, backend, device):
    dtype = torch.bfloat16 if is_second(door, backend) else torch.float32
    function, given = doors(device, backend, dtype=dtype)[door]
    with Recorded() as recorded:
        value_and_gradients(function, given)
    assert recorded.calls
    for op, arguments in recorded.calls.values():
        torch.library.opcheck(op, arguments)


def test_every_registered_op_is_behind_some_door():
    """So that the test above leaves none out."""
    called = set()
    for size in ({}, {"dtype": torch.bfloat16}, {"vocabulary": LARGE, "width": 260}):
        for function, given in doors(torch.device("cpu"), "reference", **size).values():
            with Recorded() as recorded:
                value_and_gradients(function, given)
            called |= {op._schema.name for op, _ in recorded.calls.values()}
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("wrpo::")}
    assert called == registered


@pytest.mark.parametrize("door", DOORS)
def test_a_compiled_door_is_one_graph_with_the_bits_of_the_eager_one(door, backend, device):
    size = {"vocabulary": LARGE, "width": 260} if is_second(door, backend) else {}
    function, given = doors(device, backend, **size)[door]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(value_and_gradients(compiled, given), value_and_gradients(function, given), strict=True):
        oracle.assert_same_bits(door, got, expected)


class PackedLoss(torch.nn.Module):
    def forward(self, hidden, weight, labels, bounds, alpha):
        return linear_wrpo_loss(hidden, weight, labels, alpha=alpha, cu_seqlens=bounds, backend="cuda").loss


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_what_the_host_hands_to_a_gpu_is_traced_too(kind):
    """`alpha` and the bounds of the sequences, which eager code pins. A compiler sees shapes and devices alone, so
    tensors that only pretend to be on a GPU will do."""
    with FakeTensorMode():
        floats = torch.empty(S * T, D, device="cuda"), torch.empty(V, D, device="cuda")
        labels = torch.empty(S * T, dtype=torch.int64, device="cuda")
        alpha = 0.3 if kind == "number" else torch.empty(S // 3)
        given = (*floats, labels, torch.empty(S + 1, dtype=torch.int64), alpha)
    program = torch.export.export(PackedLoss(), given, strict=True)
    (output,) = program.graph.output_node().args[0]
    assert output.meta["val"].device.type == "cuda"


@pytest.mark.parametrize("door", ["token_logp", "linear_token_logp", "linear_wrpo_loss"])
def test_new_lengths_do_not_compile_again(door):
    """The first length is compiled as it is, the second with a length that varies; the others meet that."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for steps in (5, 7, 11, 30):
        function, given = doors(torch.device("cpu"), "reference", steps=steps)[door]
        compiled = compiled or torch.compile(function, fullgraph=True, backend=counter)
        got, expected = value_and_gradients(compiled, given), value_and_gradients(function, given)
        for a, b in zip(got, expected, strict=True):
            oracle.assert_same_bits(door, a, b)
    assert counter.frame_count <= 2


def test_a_compiled_door_still_refuses_a_wrong_shape():
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: token_logp(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"target.*\[2\].*\[3\]"):
        compiled(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))


def test_a_compiled_door_still_refuses_a_wrong_label():
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: token_logp(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target\[1\].*9"):
        compiled(torch.zeros(2, 5), torch.tensor([0, 9]))


@pytest.mark.parametrize("door", DOORS)
def test_the_derivative_of_the_reference_is_that_of_finite_differences(door):
    """In float64, where the reference alone computes."""
    function, given = doors(torch.device("cpu"), "reference", steps=3, vocabulary=7, width=4)[door]
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given)
    assert torch.autograd.gradcheck(function, exact, nondet_tol=0.0, fast_mode=False)


@pytest.mark.parametrize("door", DOORS)
def test_a_second_derivative_is_refused_not_left_out(door, backend, device):
    function, given = doors(device, backend)[door]
    x = given[0]

    def second_derivative() -> None:
        (grad,) = torch.autograd.grad(function(*given).sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum() + x.square().sum(), x)

    with pytest.raises(RuntimeError, match="twice"):
        second_derivative()


@pytest.mark.parametrize("door", DOORS)
def test_autocast_changes_nothing(door, backend, device):
    """The types of the arguments settle those of the products; a cast inside would not be seen from outside."""
    function, given = doors(device, backend, steps=3)[door]  # few rows: a backend may be interpreted
    expected = value_and_gradients(function, given)
    with torch.autocast(device.type, torch.bfloat16):
        got = value_and_gradients(function, given)
    for a, b in zip(got, expected, strict=True):
        oracle.assert_same_bits(door, a, b)
