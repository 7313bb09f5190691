"""The products of a head where the CPU multiplies 16-bit matrices in software only: widened a stripe at a time."""

from __future__ import annotations

import oracle
import pytest
import torch

from wrpo_kernels import linear_token_logp
from wrpo_kernels.lm_head import products
from wrpo_kernels.lm_head.products import add_grad_weight, grad_hidden_into, grad_weight_into, logits_into

N, D, V = 37, 24, 301  # V is no multiple of a stripe, and takes several
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """As on a CPU without 16-bit products, in stripes of 64 columns."""
    monkeypatch.setattr(products, "multiplies_fast", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(products, "STRIPE_BYTES", 1)


@pytest.fixture
def operands(dtype):
    hidden, weight, delta = torch.randn(N, D), torch.randn(V, D), torch.randn(N, V)
    return tuple(x.to(dtype) for x in (hidden, weight, delta))


def assert_rounded_once(got, left, right, dtype):
    """Within half an ulp of the product in float64, and what a dot product in float32 may lose."""
    exact = left.double() @ right.double()
    slack = 0.5 * oracle.ulp(exact, dtype) + oracle.DOT_ULPS * torch.finfo(torch.float32).eps * (
        left.double().abs() @ right.double().abs()
    )
    oracle.assert_rule("product", got, exact, exact, slack)


@half
def test_each_product_is_summed_in_float32_and_rounded_once(operands, dtype):
    hidden, weight, delta = operands
    out = torch.full((N, V + 1), 7.0, dtype=dtype)  # a row longer than the product: what lies behind stays
    assert_rounded_once(logits_into(out[:, :V], hidden, weight), hidden, weight.t(), dtype)
    assert (out[:, V] == 7).all()
    assert_rounded_once(grad_hidden_into(torch.empty(N, D, dtype=dtype), delta, weight), delta, weight, dtype)
    grad_weight = torch.empty(V, D, dtype=dtype)
    grad_weight_into(grad_weight, delta, hidden)
    assert_rounded_once(grad_weight, delta.t(), hidden, dtype)


@half
def test_a_float32_total_is_never_rounded_to_16_bits(operands, dtype):
    hidden, _, delta = operands
    assert products.writes_float32(delta)
    total = torch.full((V, D), torch.nan)
    add_grad_weight(total, delta, hidden, first=True)  # overwrites, NaN too
    assert_rounded_once(total, delta.t(), hidden, torch.float32)
    add_grad_weight(total, delta, hidden, first=False)
    assert_rounded_once(total, torch.cat([delta, delta]).t(), torch.cat([hidden, hidden]), torch.float32)


@half
@pytest.mark.parametrize("budget", [None, 1], ids=["all rows fit", "one row at a time"])
def test_log_probs_and_gradients_are_those_of_the_products_as_they_stand(dtype, budget, monkeypatch):
    hidden, weight = torch.randn(N, D).to(dtype), (torch.randn(V, D) / D**0.5).to(dtype)
    target, cotangent = torch.randint(0, V, (N,)), torch.randn(N)

    def run():
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        logp = linear_token_logp(*leaves, target, budget_bytes=budget)
        return [logp.detach(), *torch.autograd.grad(logp, leaves, cotangent)]

    wide = run()
    monkeypatch.setattr(products, "multiplies_fast", lambda dtype: True)
    for name, got, plain in zip(("logp", "grad_hidden", "grad_weight"), wide, run(), strict=True):
        size = float(plain.double().square().mean().sqrt())
        difference = float((got.double() - plain.double()).square().mean().sqrt())
        assert difference <= 2 * torch.finfo(dtype).eps * size, name  # a few roundings to 16 bits on either way


def test_no_type_that_the_cpu_multiplies_is_widened(monkeypatch):
    monkeypatch.undo()
    assert products.multiplies_fast(torch.float32) and products.multiplies_fast(torch.float64)
    assert not products.is_widened(torch.zeros(1, dtype=torch.float32))
    assert not products.is_widened(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


@half
def test_without_a_product_that_adds_to_float32_the_sum_is_made_a_stripe_at_a_time(operands, dtype, monkeypatch):
    """The way of CUDA in torch 2.8 and 2.9, its one product played in float32."""
    hidden, _, delta = operands
    monkeypatch.setattr(products, "is_widened", lambda _operand: False)
    monkeypatch.setattr(products, "adds_float32", lambda _device, _dtype: False)
    taken = []
    monkeypatch.setattr(
        products, "float32_product", lambda left, right: taken.append(len(left)) or left.float() @ right.float()
    )
    total = torch.randn(V, D)
    expected = total.double() + delta.double().t() @ hidden.double()
    add_grad_weight(total, delta, hidden, first=False)
    assert len(taken) > 1
    assert sum(taken) == V
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)


def test_whether_torch_adds_a_product_to_float32_is_asked_once(monkeypatch):
    products.adds_float32.cache_clear()
    device, asked = torch.device("cpu"), []
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: asked.append(args) or real(*args, **options))
    assert products.adds_float32(device, torch.bfloat16) is products.adds_float32(device, torch.bfloat16)
    assert len(asked) == 1
    products.adds_float32.cache_clear()
