"""`token_logp`: values and gradients against float64, and the promises of its docstring."""

from __future__ import annotations

import math
import mmap

import cases
import oracle
import pytest
import torch
from cases import DTYPES, Case
from conftest import HERE, PLAYED
from oracle import Transform
from torch import Tensor

from wrpo_kernels import linear_token_logp, token_logp

PLACES = (*HERE, PLAYED)
EVERY = {**cases.SHAPES, **cases.VALUES, **cases.LAYOUTS, "minus infinity": cases.MINUS_INFINITY}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def leaves(logits: Tensor, transform: Transform) -> tuple[Tensor, Transform]:
    bias = transform.bias
    transform = transform._replace(bias=None if bias is None else bias.detach().requires_grad_())
    return logits.detach().requires_grad_(), transform


def check(logits: Tensor, target: Tensor, transform: Transform, backend: str, ignore_index: int = -100) -> None:
    """Values and gradients of our op by the error rule."""
    c = cases.cotangent(target)
    truth = oracle.token_logp_truth(logits, target, c, transform, ignore_index)
    x, ours = leaves(logits, transform)
    got = token_logp(x, target, **ours._asdict(), ignore_index=ignore_index, backend=backend)
    plain_x, plains = leaves(logits, transform)
    plain = oracle.plain_token_logp(plain_x, target, plains, ignore_index)
    assert got.dtype == torch.float32
    assert (got <= 0).all()
    oracle.assert_rule("logp", got, truth.logp, plain, truth.slack["logp"])
    wanted = {"logits": x} | ({} if ours.bias is None else {"bias": ours.bias})
    plain_wanted = {"logits": plain_x} | ({} if ours.bias is None else {"bias": plains.bias})
    grads, plain_grads = oracle.gradients(got, wanted, c), oracle.gradients(plain, plain_wanted, c)
    for name, grad in grads.items():
        assert grad.dtype == wanted[name].dtype
        oracle.assert_rule(f"grad_{name}", grad, truth.grads[name], plain_grads[name], truth.slack[name])


@dtypes
@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
def test_values_and_gradients_are_as_good_as_plain_torch(case: Case, dtype, backend, device):
    logits, target = cases.logits_of(case, dtype, device)
    check(logits, target, Transform(), backend)


@dtypes
@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_the_transform_of_the_logits_is_applied_in_the_order_of_the_models(name, dtype, backend, device):
    logits, target = cases.logits_of(Case("a tail", (6,), 131), dtype, device)
    check(logits, target, cases.TRANSFORMS[name](torch.randn(131, device=device).to(dtype)), backend)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_may_have_its_own_dtype(bias_dtype, backend, device):
    logits, target = cases.logits_of(Case("", (6,), 131), torch.bfloat16, device)
    check(logits, target, Transform(bias=torch.randn(131, device=device).to(bias_dtype)), backend)


def test_minus_infinity_survives_the_softcap(backend, device):
    logits, target = cases.logits_of(cases.MINUS_INFINITY, torch.float32, device)
    check(logits, target, Transform(softcap=30.0), backend)


@pytest.mark.parametrize("offset", [30.0, 300.0, -3000.0, 3e5])
def test_an_offset_of_all_logits_of_a_row_costs_no_digit(offset, backend, device):
    """The slack is that of their differences."""
    logits, target = cases.logits_of(Case("", (9,), 1009, target="ends"), torch.float32, device)
    check(logits + offset, target, Transform(), backend)


EPS = torch.finfo(torch.float32).eps


def nearly_certain(margin: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """logits [6, 257], target [6], and 1 - p of the target in float64: it is `margin` nats above all others."""
    logits, target = torch.randn(6, 257), torch.tensor([0, 256, 100, 1, 255, 16])
    logits[torch.arange(6), target] = logits.amax(1) + margin
    others = logits.double().scatter(1, target[:, None], -torch.inf)
    odds = (others - logits.double().gather(1, target[:, None])).exp().sum(1)
    return logits.to(device), target.to(device), (odds / (1 + odds)).to(device)


@pytest.mark.parametrize("way", ["gradient", "delta in place"])
@pytest.mark.parametrize("margin", [5, 16, 17, 20, 40, 80])
def test_a_token_that_is_nearly_certain_keeps_its_gradient(margin, way, backend, device):
    """1 - p is no difference: in float32 that is 0 beyond 16.6 nats. A row of gradients adds up to 0, as in float64.

    The score of every other token is rounded by half an ulp of its distance, 8 nats more than the margin at most.
    """
    logits, target, missing = nearly_certain(margin, device)
    x = logits.requires_grad_()
    if way == "gradient":
        logp = token_logp(x, target, backend=backend)
    else:  # delta times one
        logp = linear_token_logp(x, torch.eye(257, device=device), target, backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    allowed = (8 + margin) * EPS * missing
    label = grad.double().gather(1, target[:, None])[:, 0]
    assert ((label - missing).abs() <= allowed).all()
    assert ((logp.double() - torch.log1p(-missing)).abs() <= allowed).all()
    assert (grad.double().sum(1).abs() <= 2 * allowed).all()


@pytest.mark.parametrize("ignore_index", [7, -1, 0, 2**40])
def test_ignore_index_may_be_any_integer_even_a_token(ignore_index, backend, device):
    logits, target = cases.logits_of(Case("", (9,), 31, target="ends"), torch.float32, device)
    target[3] = ignore_index
    check(logits, target, Transform(), backend, ignore_index)


@dtypes
def test_errors_lean_to_neither_side(dtype, backend, device):
    rows = 100 if (backend, device.type) == ("triton", "cpu") else 400  # interpreted, 20 ms each
    logits, target = cases.logits_of(Case("", (rows,), 1031), dtype, device)
    c = torch.full(target.shape, 1 + 2**-8 - 2**-12, device=device)  # rounds up in bfloat16: the worst gain
    truth = oracle.token_logp_truth(logits, target, c, Transform())
    results = []
    for function in (
        lambda x: token_logp(x, target, backend=backend),
        lambda x: oracle.plain_token_logp(x, target, Transform()),
    ):
        x = logits.detach().requires_grad_()
        logp = function(x)
        results.append((logp, torch.autograd.grad(logp, x, c)[0]))
    (got, grad), (plain, plain_grad) = results
    counts = target != -100
    floor = 0.1 * EPS
    oracle.assert_unbiased("logp", got[counts], truth.logp[counts], plain[counts], floor)
    oracle.assert_typical("logp", got[counts], truth.logp[counts], plain[counts])
    oracle.assert_unbiased("grad", grad, truth.grads["logits"], plain_grad, floor)
    oracle.assert_typical("grad", grad, truth.grads["logits"], plain_grad)


@dtypes
def test_small_gradients_are_not_lost(dtype, backend, device):
    """Rows whose cotangents span eight decades: each keeps its own norm."""
    logits, target = cases.logits_of(Case("", (9,), 509, target="ends"), dtype, device)
    c = 10.0 ** torch.arange(-6, 3, device=device).float()
    if dtype == torch.float16:
        c = c.clamp(min=1e-2)  # below, float16 itself has no bits left
    truth = oracle.token_logp_truth(logits, target, c, Transform())
    x = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(token_logp(x, target, backend=backend), x, c)
    ratio = grad.double().norm(dim=1) / truth.grads["logits"].norm(dim=1)
    assert (ratio - 1).abs().max() < 2 * torch.finfo(dtype).eps


def test_equal_logits_give_minus_log_v(backend, device):
    logits, target = cases.logits_of(Case("", (3,), 50257, values="equal", target="ends"), torch.float32, device)
    assert (token_logp(logits, target, backend=backend).double() + math.log(50257)).abs().max() <= 2e-6  # 2 ulp of 10.8


@dtypes
def test_nan_stays_in_its_own_row(dtype, backend, device):
    logits, target = cases.logits_of(Case("", (6,), 131, target="ends"), dtype, device)
    logits[2, 40] = torch.nan
    x = logits.requires_grad_()
    logp = token_logp(x, target, backend=backend)
    logp.sum().backward()
    others = torch.arange(6, device=device) != 2
    assert logp[2].isnan()
    assert logp[others].isfinite().all()
    assert x.grad[others].isfinite().all()


@dtypes
def test_ignored_rows_may_hold_anything(dtype, backend, device):
    logits, target = cases.logits_of(Case("", (6,), 131, target="ends"), dtype, device)
    target[1], target[4] = -100, -100
    logits[1], logits[4] = torch.nan, torch.inf
    x = logits.requires_grad_()
    logp = token_logp(x, target, backend=backend)
    logp.sum().backward()
    for values in (logp[1], logp[4], x.grad[1], x.grad[4]):
        assert not values.any()  # exactly 0, and NaN would count as True
    assert x.grad.isfinite().all()


def test_gradient_of_an_ignored_row_is_zero_even_for_an_infinite_cotangent(backend, device):
    logits, target = cases.logits_of(Case("", (4,), 31, target="ends"), torch.float32, device)
    target[0] = -100
    x = logits.requires_grad_()
    c = torch.ones(4, device=device)
    c[0] = torch.inf
    (grad,) = torch.autograd.grad(token_logp(x, target, backend=backend), x, c)
    assert not grad[0].any()


@pytest.mark.parametrize("layout", ["contiguous", *cases.LAYOUTS])
def test_inputs_are_not_changed_nor_what_lies_between_them(layout, backend, device):
    logits, target = cases.logits_of(cases.LAYOUTS.get(layout, Case("")), torch.float32, device)
    storage = torch.empty(0, dtype=logits.dtype, device=device).set_(logits.untyped_storage())
    before, target_before = storage.clone(), target.clone()
    x = logits.detach().requires_grad_()
    token_logp(x, target, backend=backend).sum().backward()
    oracle.assert_same_bits("logits", storage, before)
    assert torch.equal(target, target_before)


def test_rows_may_stand_more_than_two_to_the_31_elements_apart(backend, device):
    """On the CPU only the pages that are touched take memory; `test_gpu.py` has a tensor that fills the device."""
    if device.type != "cpu":
        pytest.skip("memory of a device is taken whole")
    vocabulary, stride = 7, 2**31 + 5
    memory = torch.frombuffer(mmap.mmap(-1, 4 * (stride + vocabulary)), dtype=torch.float32)
    logits = memory.as_strided((2, vocabulary), (stride, 1))
    check(logits.copy_(torch.randn(2, vocabulary)), torch.tensor([0, 6]), Transform(), backend)


@dtypes
def test_a_second_run_gives_the_same_bits(dtype, backend, device):
    logits, target = cases.logits_of(Case("", (33,), 4097), dtype, device)
    c = cases.cotangent(target)
    runs = []
    for _ in range(2):
        x = logits.detach().requires_grad_()
        logp = token_logp(x, target, backend=backend)
        runs.append((logp, torch.autograd.grad(logp, x, c)[0]))
    oracle.assert_same_bits("logp", runs[0][0], runs[1][0])
    oracle.assert_same_bits("grad", runs[0][1], runs[1][1])


def test_the_number_of_threads_does_not_change_the_bits(device):
    logits, target = cases.logits_of(Case("", (33,), 4097), torch.bfloat16, torch.device("cpu"))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(token_logp(logits, target))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        oracle.assert_same_bits("logp", other, results[0])


def test_a_row_alone_gives_the_bits_it_has_in_a_batch(backend, device):
    logits, target = cases.logits_of(Case("", (33,), 1009, target="ends"), torch.bfloat16, device)
    together = token_logp(logits, target, backend=backend)
    alone = torch.cat([token_logp(logits[n : n + 1], target[n : n + 1], backend=backend) for n in range(33)])
    if (backend, device.type) != ("reference", "cuda"):
        oracle.assert_same_bits("logp", alone, together)
        return
    # There torch adds up a row in another order when it has fewer neighbours: two errors of float32 arithmetic.
    truth = oracle.token_logp_truth(logits, target, torch.ones_like(together), Transform())
    oracle.assert_rule("logp", alone, together.double(), together, 2 * truth.slack["logp"])


def test_the_graph_can_be_walked_twice(backend, device):
    logits, target = cases.logits_of(Case("", (7,), 131), torch.bfloat16, device)
    x, c = logits.requires_grad_(), cases.cotangent(target)
    logp = token_logp(x, target, backend=backend)
    first = torch.autograd.grad(logp, x, c, retain_graph=True)[0]
    second = torch.autograd.grad(logp, x, c, retain_graph=True)[0]
    oracle.assert_same_bits("grad", second, first)
    assert torch.equal(torch.autograd.grad(logp, x, -c)[0], -first)


@pytest.mark.parametrize("wanted", [("logits",), ("bias",), ("logits", "bias")], ids="+".join)
def test_only_what_requires_grad_gets_one(wanted, backend, device):
    logits, target = cases.logits_of(Case("", (7,), 131), torch.float32, device)
    tensors = {"logits": logits, "bias": torch.randn(131, device=device)}
    for name in wanted:
        tensors[name].requires_grad_()
    token_logp(tensors["logits"], target, bias=tensors["bias"], backend=backend).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(wanted)


def test_no_grad_leaves_no_graph(backend, device):
    logits, target = cases.logits_of(Case(""), torch.float32, device)
    with torch.no_grad():
        assert token_logp(logits.requires_grad_(), target, backend=backend).grad_fn is None
    assert token_logp(logits.detach(), target, backend=backend).grad_fn is None


def test_float64_is_exact_in_the_reference(device):
    logits, target = cases.logits_of(Case("", (7,), 131), torch.float64, device)
    logp = token_logp(logits, target, backend="reference")
    assert logp.dtype == torch.float64
    assert torch.allclose(logp, oracle.pick(logits, target, -100), rtol=1e-14, atol=1e-14)


GOOD = {"logits": torch.zeros(2, 3, 5), "target": torch.zeros(2, 3, dtype=torch.int64)}
REFUSED = {
    "logits of another type": ({"logits": [[0.0]]}, TypeError, "logits.*list"),
    "target of another type": ({"target": [0]}, TypeError, "target.*list"),
    "integer logits": ({"logits": torch.zeros(2, 3, 5).long()}, ValueError, "logits.*float32.*int64"),
    "logits without a vocabulary": ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"logits.*V.*\[2, 3, 0\]"),
    "scalar logits": ({"logits": torch.tensor(1.0)}, ValueError, r"logits.*V.*\[\]"),
    "sparse logits": ({"logits": torch.zeros(2, 3, 5).to_sparse()}, ValueError, "logits.*dense.*sparse_coo.*to_dense"),
    "mkldnn logits": ({"logits": torch.zeros(2, 3, 5).to_mkldnn()}, ValueError, "logits.*dense.*_mkldnn.*to_dense"),
    "float target": ({"target": torch.zeros(2, 3)}, ValueError, "target.*int64.*float32"),
    "int16 target": ({"target": torch.zeros(2, 3).short()}, ValueError, "target.*int64.*int16"),
    "target of another shape": ({"target": torch.zeros(3, 2).long()}, ValueError, r"target.*\[2, 3\].*\[3, 2\]"),
    "target elsewhere": ({"target": torch.zeros(2, 3).long().to("meta")}, ValueError, "target.*cpu.*meta"),
    "target = V": ({"target": torch.full((2, 3), 5)}, ValueError, "target.*5"),
    "target = -1": ({"target": torch.full((2, 3), -1)}, ValueError, "target.*-1"),
    "target far out": ({"target": torch.full((2, 3), 2**62)}, ValueError, f"target.*{2**62}"),
    "bias of another shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[V\].*\[5\].*\[4\]"),
    "integer bias": ({"bias": torch.zeros(5).int()}, ValueError, "bias.*int32"),
    "bias elsewhere": ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias.*cpu.*meta"),
    "bias a number": ({"bias": 1.0}, TypeError, "bias.*float"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap.*-1"),
    "NaN softcap": ({"softcap": math.nan}, ValueError, "softcap.*nan"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature.*> 0.*0"),
    "infinite temperature": ({"temperature": math.inf}, ValueError, "temperature.*inf"),
    "temperature as text": ({"temperature": "1"}, TypeError, "temperature.*str"),
    "no temperature": ({"temperature": None}, TypeError, "temperature.*NoneType"),
    "NaN scale": ({"logit_scale": math.nan}, ValueError, "logit_scale.*nan"),
    "scale a tensor": ({"logit_scale": torch.ones(2)}, TypeError, "logit_scale.*Tensor"),
    "ignore_index a fraction": ({"ignore_index": 0.5}, TypeError, "ignore_index"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend.*native.*reference.*'fast'"),
    "backend a flag": ({"backend": True}, (ValueError, TypeError), "backend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name):
    changes, error, message = REFUSED[name]
    arguments = {**GOOD, **changes}
    with pytest.raises(error, match=f"(?s){message}"):
        token_logp(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_the_row_of_a_wrong_target_is_named(backend, device):
    if backend in ("cuda", "triton"):
        pytest.skip("reading targets would wait for the device; tests/kernels/test_cuda.py says what happens instead")
    target = torch.zeros(7, dtype=torch.int64, device=device)
    target[4] = 9
    with pytest.raises(ValueError, match=r"target.*4.*V.*5.*9"):
        token_logp(torch.zeros(7, 5, device=device), target, backend=backend)
