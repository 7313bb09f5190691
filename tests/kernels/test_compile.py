"""The ops as torch sees them: a right schema, fake and derivative, and no graph break under `torch.compile`."""

from __future__ import annotations

import os
import shutil

import oracle
import pytest
import torch
from conftest import HERE
from doors import DOORS, LARGE, OF_OPS, D, S, T, V, doors, value_and_gradients
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wrpo_kernels import dpo_loss, linear_token_logp, linear_wrpo_loss, preference_loss, token_logp
from wrpo_kernels.lm_head.rows import UNCOUNTED

COMPILER = os.environ.get("CXX", "g++")  # of Inductor
NO_WORDS = r"ExceptionVariable\(<class 'ValueError'>\)"  # all that torch 2.8 says of an error met while it traces

KINDS = [
    pytest.param(kind, marks=pytest.mark.gpu if kind == "cuda" else ()) for kind in sorted({kind for _, kind in HERE})
]


def is_second(door: str, backend: str) -> bool:
    """One of two variants, so that every door meets both, on one backend each, and every backend both.

    For what does not depend on the backend, which is a constant of the graph and of the op's arguments.
    """
    return (DOORS.index(door) + ("native", "reference", "triton", "cuda").index(backend)) % 2 == 1


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


EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("door", OF_OPS)
def test_every_op_has_a_right_schema_fake_and_derivative(door, backend, device):
    """The last check traces the derivative, which takes ten times as long: for one of two backends, in one type."""
    traced = (torch.float32, torch.bfloat16)[OF_OPS.index(door) // 2 % 2] if is_second(door, backend) else None
    for dtype in (torch.float32, torch.bfloat16):
        function, given = doors(device, backend, dtype=dtype)[door]
        with Recorded() as recorded:
            value_and_gradients(function, given)
        assert recorded.calls
        for op, arguments in recorded.calls.values():
            library.opcheck(op, arguments, test_utils=EVERY_CHECK if dtype == traced else EVERY_CHECK[:-1])


@pytest.mark.parametrize("door", [door for door in DOORS if door.startswith("linear")])
def test_an_op_that_is_not_told_how_many_labels_count_returns_what_its_fake_says(door):
    """As compiled code calls it; some labels are ignored, so that there are fewer rows than labels."""
    size = {"vocabulary": LARGE, "width": 260} if is_second(door, "native") else {}
    function, given = doors(torch.device("cpu"), "reference", **size)[door]
    with Recorded() as recorded:
        value_and_gradients(function, given)
    told = 0
    for op, arguments in recorded.calls.values():
        names = [argument.name for argument in op._schema.arguments]
        if {"num_rows", "budget_bytes"} <= set(names) and "kept" not in names:
            at = names.index("num_rows")
            library.opcheck(
                op, (*arguments[:at], UNCOUNTED, *arguments[at + 1 :]), test_utils=("test_schema", "test_faketensor")
            )
            told += 1
    assert told


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


def shortened(value: Tensor) -> Tensor:
    return value[..., :-1] if value.dim() else value[None].expand(2)


@pytest.mark.parametrize("door", OF_OPS)
def test_an_op_called_by_its_own_name_refuses_what_its_kernel_would_read_beyond(door):
    """As an exported program calls it, past the doors: every tensor one element short in its last dimension."""
    size = {"vocabulary": LARGE, "width": 260} if is_second(door, "native") else {}
    function, given = doors(torch.device("cpu"), "reference", **size)[door]
    with Recorded() as recorded:
        value_and_gradients(function, given)
    for op, arguments in recorded.calls.values():
        for at, argument in enumerate(op._schema.arguments):
            # Bounds one short do not end at the last row; a total is scaled as it is.
            if isinstance(arguments[at], Tensor) and argument.name != "total":
                wrong = (*arguments[:at], shortened(arguments[at]), *arguments[at + 1 :])
                with pytest.raises(ValueError):
                    op(*wrong)


def assert_compiled_is_eager(door: str, backend: str | None, device: torch.device, is_large: bool) -> None:
    size = {"vocabulary": LARGE, "width": 260} if is_large else {}
    function, given = doors(device, backend, **size)[door]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(value_and_gradients(compiled, given), value_and_gradients(function, given), strict=True):
        oracle.assert_same_bits(door, got, expected)


@pytest.mark.parametrize("door", OF_OPS)
def test_a_compiled_door_is_one_graph_with_the_bits_of_the_eager_one(door, backend, device):
    assert_compiled_is_eager(door, backend, device, is_second(door, backend))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", [door for door in DOORS if door not in OF_OPS])
def test_a_compiled_loss_that_calls_a_general_one_is_one_graph_too(door, kind):
    """Whichever backend that takes by itself on each kind of device here."""
    assert_compiled_is_eager(door, None, torch.device(kind), DOORS.index(door) % 2 == 1)


# Each calls an op of its own name; the other doors call these ops too.
NAMED_AFTER_OPS = [door for door in OF_OPS if hasattr(torch.ops.wrpo, door.partition(",")[0])]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"Inductor needs a C++ compiler, and {COMPILER} is missing")
@pytest.mark.parametrize("door", NAMED_AFTER_OPS)
def test_inductor_takes_every_op(door):
    """The compiler that `torch.compile` takes by itself: it relies on the shapes and strides that the fakes promise."""
    size = {"vocabulary": LARGE, "width": 260} if is_second(door, "native") else {}
    function, given = doors(torch.device("cpu"), "reference", **size)[door]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, options={"fx_graph_cache": False})  # no graph of another day
    for got, expected in zip(value_and_gradients(compiled, given), value_and_gradients(function, given), strict=True):
        torch.testing.assert_close(got, expected)


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


def counted_rows(number: int) -> Tensor:
    labels = torch.full((S, T), -100)
    labels.view(-1)[:number] = 3
    return labels


HIDDEN, WEIGHT, LOGP = torch.randn(S, T, D), torch.randn(V, D), torch.randn(S)
PAIRS = {"seq_weight": torch.tensor([1.0, 1, 1, -1, -1, -1]), "group": torch.tensor([0, 1, 2, 0, 1, 2])}
# A number that changes from step to step, and the loss of it.
CHANGING = {
    "num_rows": lambda n: linear_token_logp(HIDDEN, WEIGHT, counted_rows(10 + n), num_rows=10 + n).sum(),
    "num_rows of a loss": lambda n: (
        linear_wrpo_loss(HIDDEN, WEIGHT, counted_rows(10 + n), alpha=0.3, num_rows=10 + n, empty="zero").loss
    ),
    "num_groups": lambda n: (
        preference_loss(LOGP, seq_weight=LOGP, group=torch.arange(S) % min(n, S), num_groups=min(n, S), beta=1.0).loss
    ),
    "normalizer": lambda n: preference_loss(LOGP, **PAIRS, num_groups=3, beta=0.1, normalizer=2.5 * n).loss,
    "nll_weight": lambda n: preference_loss(LOGP, **PAIRS, num_groups=3, beta=0.1, nll_weight=0.1 * n).loss,
    "nll_weight of pairs": lambda n: dpo_loss(*LOGP.chunk(2), nll_weight=0.1 * n).loss,
    "alpha": lambda n: linear_wrpo_loss(HIDDEN, WEIGHT, counted_rows(30), alpha=0.01 * n).loss,
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_number_that_changes_at_every_step_does_not_compile_again(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CHANGING[name], fullgraph=True, backend=counter)
    for n in range(2, 14):
        torch.testing.assert_close(compiled(n), CHANGING[name](n))
    assert counter.frame_count <= 2


# Log-probs under options that are constants of a graph: of logits, and from hidden states.
WITH_OPTIONS = {
    "token_logp": lambda labels, **options: token_logp((HIDDEN @ WEIGHT.T).view(-1, V), labels.view(-1), **options),
    "linear_token_logp": lambda labels, **options: linear_token_logp(HIDDEN, WEIGHT, labels, **options),
}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_an_option_that_changes_compiles_again_and_counts(name):
    torch._dynamo.reset()
    compiled = torch.compile(WITH_OPTIONS[name], fullgraph=True, backend="aot_eager")
    for mark, temperature in ((-100, 1.0), (-1, 0.5), (0, 2.0)):
        labels = counted_rows(30)
        given = {"labels": labels.where(labels != -100, mark), "ignore_index": mark, "temperature": temperature}
        torch.testing.assert_close(compiled(**given), WITH_OPTIONS[name](**given))


def test_one_graph_needs_the_number_of_groups():
    torch._dynamo.reset()

    def loss(logp: Tensor) -> Tensor:
        return preference_loss(logp, **PAIRS, beta=0.1).loss

    with pytest.raises(Exception, match=f"num_groups must be given|{NO_WORDS}"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(LOGP)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loss, backend="aot_eager")(LOGP), loss(LOGP))


def test_a_compiled_door_still_refuses_a_wrong_shape():
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: token_logp(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=rf"target.*\[2\].*\[3\]|{NO_WORDS}"):
        compiled(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))


def test_a_compiled_door_still_refuses_a_wrong_label():
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, y: token_logp(z, y), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"target\[1\].*9"):
        compiled(torch.zeros(2, 5), torch.tensor([0, 9]))


@pytest.mark.parametrize("door", OF_OPS)
def test_the_derivative_of_the_reference_is_that_of_finite_differences(door):
    """In float64, where the reference alone computes."""
    function, given = doors(torch.device("cpu"), "reference", steps=3, vocabulary=5, width=3)[door]
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given)
    assert torch.autograd.gradcheck(function, exact, nondet_tol=0.0, fast_mode=False)


@pytest.mark.parametrize("door", OF_OPS)
def test_a_second_derivative_is_refused_not_left_out(door, backend, device):
    function, given = doors(device, backend)[door]
    x = given[0]

    def second_derivative() -> None:
        (grad,) = torch.autograd.grad(function(*given).sum(), x, create_graph=True)
        torch.autograd.grad(grad.square().sum() + x.square().sum(), x)

    with pytest.raises(RuntimeError, match="twice"):
        second_derivative()


@pytest.mark.parametrize("door", OF_OPS)
def test_autocast_changes_nothing(door, backend, device):
    """The types of the arguments settle those of the products; a cast inside would not be seen from outside."""
    function, given = doors(device, backend, steps=3)[door]  # few rows: a backend may be interpreted
    expected = value_and_gradients(function, given)
    with torch.autocast(device.type, torch.bfloat16):
        got = value_and_gradients(function, given)
    for a, b in zip(got, expected, strict=True):
        oracle.assert_same_bits(door, a, b)
