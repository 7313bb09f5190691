"""Float32 logits of 16-bit operands (`logits_dtype`): what they gain, on every backend, and what they may take."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import interpreter
import pytest
import torch
from cost import budget_of, measured
from torch import Tensor, library

from wrpo_kernels import (
    linear_cross_entropy,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_kto_loss,
    linear_nll_loss,
    linear_preference_loss,
    linear_simpo_loss,
    linear_token_logp,
    linear_token_statistics,
    linear_wrpo_loss,
)
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.lm_head import products
from wrpo_kernels.lm_head.inputs import checked_options, checked_tensors
from wrpo_kernels.lm_head.products import logits_into
from wrpo_kernels.lm_head.rows import UNCOUNTED

S, T, D, V, R = 6, 2, 64, 257, 4
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SOME = budget_of(5, V, D, torch.bfloat16)  # rows that are kept, and rows that are made again
budgets = pytest.mark.parametrize("budget", [None, SOME], ids=["all rows fit", "some fit"])
float32_logits = partial(linear_token_logp, logits_dtype=torch.float32)


def head_of(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Operands whose logits reach 15 nats, so that their rounding to 16 bits shows."""
    shapes = {"hidden": (S, T, D), "weight": (V, D), "bias": (V,), "low": (S, T, R), "up": (V, R)}
    scales = {"hidden": 1.0, "weight": 3 / D**0.5, "bias": 1.0, "low": 1.0, "up": 0.5}
    return {name: (scales[name] * torch.randn(shape)).to(device, dtype) for name, shape in shapes.items()}


def labels_of(device: torch.device) -> Tensor:
    labels = torch.randint(0, V, (S, T))
    labels[0, 0] = -100
    labels[2:, 1] = -100  # 7 rows count: a backend may be interpreted
    return labels.to(device)


def of_tokens(op: Callable, head: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    adapter = (head["low"], head["up"])
    return op(head["hidden"], head["weight"], labels, bias=head["bias"], adapter=adapter, **options)


def value_and_gradients(head: dict[str, Tensor], wanted: set[str], call: Callable[[dict], Tensor], c: Tensor) -> dict:
    given = {name: value.detach().requires_grad_(name in wanted) for name, value in head.items()}
    value = call(given)
    leaves = {name: given[name] for name in head if name in wanted}
    grads = torch.autograd.grad((value * c).sum(), list(leaves.values())) if leaves else ()
    return {"logp": value.detach(), **dict(zip(leaves, grads, strict=True))}


def plain(head: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Of float64 operands the truth; of others with products and logits in float32."""
    wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in head.items()}
    z = wide["hidden"] @ wide["weight"].t() + wide["low"] @ wide["up"].t() + wide["bias"]
    picked = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.where(labels != -100, 0.0)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@dtypes
@budgets
@pytest.mark.parametrize("wanted", [(), ("hidden",), ("hidden", "weight", "bias", "low", "up")], ids=len)
def test_log_probs_are_right_to_1e_4_and_gradients_nearer_than_with_rounded_logits(
    wanted, budget, dtype, backend, device
):
    head, labels, c = head_of(dtype, device), labels_of(device), torch.randn(S, T, device=device)
    run = partial(value_and_gradients, wanted=set(wanted), c=c)
    exact = run({name: x.double() for name, x in head.items()}, call=lambda given: plain(given, labels))
    best = run(head, call=lambda given: plain(given, labels))
    options = {"budget_bytes": budget, "backend": backend}
    ours = run(head, call=lambda given: of_tokens(float32_logits, given, labels, **options))
    rounded = run(head, call=lambda given: of_tokens(linear_token_logp, given, labels, **options))
    assert (ours["logp"] - exact["logp"]).abs().max() < 1e-4
    assert (rounded["logp"] - exact["logp"]).abs().max() > 1e-3
    for name in wanted:
        error = rms(ours[name] - exact[name])
        assert ours[name].dtype == dtype
        # Beside the rounding of the gradient, which plain torch has too: that of the delta, of c h, and of the products
        # of several chunks.
        assert error <= 3 * rms(best[name] - exact[name]), name
        assert error < 0.8 * rms(rounded[name] - exact[name]), name


OUTPUTS = ("entropy", "lse", "mean_logits", "log_sum_sq_probs")
DOORS: dict[str, Callable[..., Tensor]] = {
    "preference": lambda h, w, y, **o: linear_preference_loss(
        h, w, y, seq_weight=h.new_tensor([1.0, -1] * 3, dtype=torch.float32), group=torch.arange(S) // 2, beta=0.1, **o
    ).logp,
    "wrpo": lambda h, w, y, **o: linear_wrpo_loss(h, w, y, alpha=0.3, beta=0.1, **o).logp,
    "dpo": lambda h, w, y, **o: linear_dpo_loss(h, w, y, **o).logp,
    "ipo": lambda h, w, y, **o: linear_ipo_loss(h, w, y, **o).logp,
    "simpo": lambda h, w, y, **o: linear_simpo_loss(h, w, y, **o).logp,
    "kto": lambda h, w, y, **o: linear_kto_loss(h, w, y, is_desirable=torch.arange(S) % 2 == 0, **o).logp,
    "nll": lambda h, w, y, **o: linear_nll_loss(h, w, y, **o).logp,
    "cross entropy": lambda h, w, y, **o: linear_cross_entropy(h, w, y, reduction="none", **o),
    "smoothed": lambda h, w, y, **o: linear_cross_entropy(
        h, w, y, reduction="none", label_smoothing=0.1, z_loss=0.01, softcap=30.0, **o
    ),
    "statistics": lambda h, w, y, **o: torch.stack(
        [x.double() for x in linear_token_statistics(h, w, y, outputs=OUTPUTS, **o)if x is not None]
    ),
    "ids": lambda h, w, y, **o: linear_token_statistics(h, w, y, outputs=(), ids=torch.arange(5), **o).logp_of_ids,
}  # fmt: skip


@pytest.mark.parametrize("budget", [None, 1], ids=["all rows fit", "one row at a time"])
@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_them(door, budget):
    """The truth is the same door's, of the same operands in float64."""
    head, labels = head_of(torch.bfloat16, torch.device("cpu")), labels_of(torch.device("cpu"))
    operands = [head[name].requires_grad_() for name in ("hidden", "weight")]
    exact = DOORS[door](*[x.double() for x in operands], labels)
    errors = [
        (DOORS[door](*operands, labels, logits_dtype=dtype, budget_bytes=budget) - exact).abs().max().item()
        for dtype in (torch.float32, None)
    ]
    assert errors[0] < T * 1e-4
    assert errors[0] < errors[1] / 20


@pytest.mark.parametrize("budget", [None, SOME], ids=["all rows fit", "some fit"])
def test_statistics_are_right_to_1e_4_and_their_gradients_nearer(budget, backend, device):
    head, labels = head_of(torch.bfloat16, device), labels_of(device)

    def entropy_and_gradient(dtype: torch.dtype, **options) -> tuple[Tensor, Tensor]:
        hidden = head["hidden"].to(dtype).requires_grad_()
        found = linear_token_statistics(hidden, head["weight"].to(dtype), labels, **options)
        return found.entropy.detach(), torch.autograd.grad((found.entropy + found.lse).sum(), hidden)[0]

    here = {"backend": backend, "budget_bytes": budget}
    exact, rounded = entropy_and_gradient(torch.float64), entropy_and_gradient(torch.bfloat16, **here)
    ours = entropy_and_gradient(torch.bfloat16, logits_dtype=torch.float32, **here)
    assert (ours[0] - exact[0]).abs().max() < 1e-4 < 1e-3 < (rounded[0] - exact[0]).abs().max()
    assert rms(ours[1] - exact[1]) < 0.5 * rms(rounded[1] - exact[1])


@pytest.mark.parametrize(("op", "wanted"), [("linear_token_logp", ()), ("linear_token_statistics", (True,) * 4)])
def test_the_ops_have_right_schemas_fakes_and_derivatives(op, wanted):
    """Some deltas or logits are kept: their types depend on the option."""
    head, labels = head_of(torch.bfloat16, torch.device("cpu")), labels_of(torch.device("cpu"))
    hidden, weight, bias = (head[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    tensors = checked_tensors(hidden, weight, labels, bias, None)
    options = checked_options(tensors, 1.0, None, 1.0, -100, UNCOUNTED, SOME, None, torch.float32, "reference")
    library.opcheck(getattr(torch.ops.wrpo, op).default, (*tensors, *options, *wanted))


def test_compiled_in_one_graph_they_have_the_bits_of_eager_calls():
    head, labels = head_of(torch.bfloat16, torch.device("cpu")), labels_of(torch.device("cpu"))

    def call(hidden, weight):
        options = {"logits_dtype": torch.float32, "budget_bytes": SOME}
        return linear_dpo_loss(hidden, weight, labels, **options).loss + float32_logits(hidden, weight, labels).sum()

    torch._dynamo.reset()
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [head[name].detach().requires_grad_() for name in ("hidden", "weight")]
        value = run(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@dtypes
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 1), (1, 97, 8), (3, 1009, 17), (64, 300, 576)])
@pytest.mark.parametrize("way", ["as here", "multiplies_fast", "subtracts_unrounded"])
def test_a_logit_is_the_sum_of_its_product(way, rows, vocabulary, width, dtype, monkeypatch):
    """A CPU's 16-bit products round: twice u relative, u the half of an ulp. Several stripes; a row longer than V."""
    monkeypatch.setattr(products, "STRIPE_BYTES", 1)
    if way != "as here":  # a CPU without 16-bit products, and one that rounds them too early: the weight is widened
        monkeypatch.setattr(products, way, lambda dtype: dtype == torch.float32)
    shapes = ((rows, width), (vocabulary, width), (rows, 2), (vocabulary, 2))
    hidden, weight, low, up = (torch.randn(shape).to(dtype) for shape in shapes)
    out = torch.full((rows, vocabulary + 1), 7.0)
    logits_into(out[:, :vocabulary], hidden, weight, low, up)
    parts = [(a.double(), b.double().t()) for a, b in ((hidden, weight), (low, up))]
    slack = sum(a.abs() @ b.abs() for a, b in parts) * 4 * torch.finfo(torch.float32).eps
    if way == "as here":
        u = torch.finfo(dtype).eps / 2
        # In float16 the second product may be subnormal, where half an ulp is 2^-25.
        slack = slack + sum((a @ b).abs() * u**2 * (1 + u) + 2.0**-25 for a, b in parts)
    assert ((out[:, :vocabulary] - sum(a @ b for a, b in parts)).abs() <= slack).all()
    assert (out[:, vocabulary] == 7).all()


def test_a_logit_beyond_the_range_of_the_operands_is_no_nan_and_the_row_beside_it_right():
    hidden, weight = torch.full((2, 4), 200.0).half(), torch.full((3, 4), 200.0).half()
    weight[1] = -weight[1]
    weight[2] = 1
    out = logits_into(torch.empty(2, 3), hidden, weight)
    assert out[0].tolist() == [160000.0, -160000.0, 800.0]


def test_the_question_what_the_cpu_does_is_asked_on_the_cpu_whatever_the_default_device():
    products.subtracts_unrounded.cache_clear()
    operands = torch.randn(2, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.tensor([1, 4])
    with torch.device("meta"):
        assert float32_logits(*operands).isfinite().all()


@pytest.mark.parametrize(("backend", "is_trained"), [("triton_fused", False), ("triton_exp", True)])
def test_backends_that_never_round_a_logit_give_the_same_with_and_without(backend, is_trained):
    if reason := triton_backend.missing():
        pytest.skip(reason)
    interpreter.compute_like_a_gpu()
    head, labels = head_of(torch.bfloat16, torch.device("cpu")), torch.tensor([3, 5])
    hidden, weight = head["hidden"][0, :2].requires_grad_(is_trained), head["weight"][:64].requires_grad_(is_trained)
    results = []
    for dtype in (None, torch.float32):
        logp = linear_token_logp(hidden, weight, labels, logits_dtype=dtype, backend=backend)
        results.append([logp, *(torch.autograd.grad(logp.sum(), (hidden, weight)) if is_trained else ())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("operands", "asked"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)],
)
def test_another_type_is_refused(operands, asked):
    hidden, weight = torch.randn(2, D).to(operands), torch.randn(V, D)
    with pytest.raises(ValueError, match=f"logits_dtype must be None, {operands} as hidden.* got {asked}"):
        linear_token_logp(hidden, weight, torch.zeros(2, dtype=torch.int64), logits_dtype=asked)


def test_of_float32_operands_they_change_nothing():
    hidden, weight, target = torch.randn(3, D), torch.randn(V, D), torch.tensor([1, -100, 3])
    assert torch.equal(float32_logits(hidden, weight, target), linear_token_logp(hidden, weight, target))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_within_the_budget():
    measures = measured("""
        from wrpo_kernels import linear_token_logp, linear_token_statistics
        V, D, MiB = 8192, 256, 1 << 20
        result = {}
        weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_()
        for rows in (64, 1024):
            hidden = torch.randn(rows, D, dtype=torch.bfloat16).requires_grad_()
            target = torch.randint(0, V, (rows,))
            for kind in ("no_grad", "trained", "statistics"):
                def call():
                    with torch.set_grad_enabled(kind != "no_grad"):
                        w = weight.detach() if kind == "frozen" else weight
                        options = {"budget_bytes": 24 * MiB, "logits_dtype": torch.float32}
                        if kind == "statistics":
                            logp = linear_token_statistics(hidden, w, target, outputs=["entropy"], **options).entropy
                        else:
                            logp = linear_token_logp(hidden, w, target, **options)
                    leaves = [hidden] + [weight] * (kind in ("trained", "statistics"))
                    return logp.detach(), kind == "no_grad" or torch.autograd.grad(logp.sum(), leaves)
                result[f"{kind} {rows}"] = growth(call) / MiB
    """)
    for name, megabytes in measures.items():
        kind, rows = name.split()
        if rows == "64":
            continue  # the first calls: what the library and the matrix products set up once
        gradients = 0 if kind == "no_grad" else 1 + 4 + 8  # of which 8 are the float32 total of the head
        # And stripes of 8 MiB, of the logits and of dW; all rows at once would be 48 MiB.
        assert megabytes <= 24 + 24 + gradients, f"{name} rows: {megabytes:.0f} MiB; all: {measures}"
