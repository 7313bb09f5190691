"""`grad_filter`: the documented bounds hold against float64, and nothing else changes."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cost import budget_of, product_flops
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp, linear_wrpo_loss
from wrpo_kernels.lm_head.column_filter import columns_that_count

N, D, V = 48, 16, 1031
BUDGETS = {"all rows fit": None, "a third of the rows": 16, "one row": 1}
budgets = pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS.keys())
bounds = pytest.mark.parametrize("eps", [1e-5, 1e-3, 2e-2])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
half_precision = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of what the exact gradients err by, relative


def trained(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """As of a trained model: 128 tokens share nearly all of each row; scores of the others are lower by 8 +- 2."""
    hidden, weight = torch.randn(N, D), 0.5 * torch.randn(V, D)
    hidden[:, 0] = 4.0
    weight[:, 0] = -1.0
    weight[torch.randperm(V)[:128], 0] = 1.0
    return hidden.to(dtype).to(device), weight.to(dtype).to(device), torch.randint(0, V, (N,), device=device)


def budget(rows: int | None, dtype: torch.dtype) -> int | None:
    return None if rows is None else budget_of(rows, V, D, dtype)


def gradients(hidden, weight, target, c, wanted=("hidden", "weight"), **options) -> dict[str, Tensor]:
    given = {"hidden": hidden, "weight": weight}
    given = {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}
    logp = linear_token_logp(**given, target=target, **options)
    return oracle.gradients(logp, {name: given[name] for name in wanted}, c)


def allowed(hidden, weight, target, c, eps) -> dict[str, Tensor]:
    """The bounds of the docstring, of every row of dh and of dW, for any set of tokens that are no target."""
    size_w, size_h = weight.double().norm(dim=1), hidden.double().norm(dim=1)
    delta = torch.softmax(hidden.double() @ weight.double().t(), 1)
    may_go = ~(delta >= eps).any(0)
    may_go[target] = False
    grad_hidden = c.double().abs() * eps * (size_w * may_go).sum()
    grad_weight = eps * (c.double().abs() * size_h).sum()
    return {"hidden": grad_hidden, "weight": torch.full_like(size_w, float(grad_weight))}


@bounds
@budgets
@dtypes
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("hidden", "weight")], ids="+".join)
def test_the_errors_stay_within_the_documented_bounds(wanted, dtype, rows, eps, backend, device):
    hidden, weight, target = trained(dtype, device)
    c = torch.randn(N, device=device)
    options = {"wanted": wanted, "budget_bytes": budget(rows, dtype), "backend": backend}
    got = gradients(hidden, weight, target, c, grad_filter=eps, **options)
    exact = oracle.linear_truth(hidden, weight, target, c, oracle.Transform()).grads
    slack = allowed(hidden, weight, target, c, eps)
    for name in wanted:
        error = (got[name].double() - exact[name]).norm(dim=1)
        rounding = half_precision[dtype] * exact[name].norm(dim=1).max()
        if name == "hidden" and rows is not None:  # a token may count in one chunk and not in another
            slack[name] = c.double().abs() * eps * weight.double().norm(dim=1).sum()
        assert (error <= slack[name] + rounding).all(), name


@dtypes
def test_rows_of_dw_that_count_are_exact_and_the_others_zero(dtype, device):
    hidden, weight, target = trained(dtype, device)
    c = torch.randn(N, device=device)
    got = gradients(hidden, weight, target, c, grad_filter=1e-3)["weight"]
    exact = gradients(hidden, weight, target, c)["weight"]
    left = got.abs().sum(1) > 0
    assert left[target].all()
    assert 0 < int(left.sum()) < V // 2
    error = (got.double() - exact.double())[left].norm(dim=1)
    assert (error <= half_precision[dtype] * exact.double().norm(dim=1).max()).all()


def test_values_do_not_depend_on_it(backend, device):
    hidden, weight, target = trained(torch.float32, device)
    expected = linear_token_logp(hidden, weight, target, backend=backend)
    leaf = weight.requires_grad_()
    oracle.assert_same_bits(
        "logp", linear_token_logp(hidden, leaf, target, grad_filter=1e-2, backend=backend), expected
    )


def test_the_products_touch_only_the_columns_that_count():
    hidden, weight, target = trained(torch.float32)
    delta = -torch.softmax(hidden @ weight.t(), 1)
    left = columns_that_count(delta, target, 1e-3)
    unit = 2 * N * D * V
    flops = product_flops(lambda: gradients(hidden, weight, target, torch.ones(N), grad_filter=1e-3))
    assert abs(flops / unit - (1 + 2 * len(left) / V)) < 0.02


def test_columns_are_those_of_targets_of_large_entries_and_of_nan():
    delta = torch.full((3, 12), 1e-4)
    delta[1, 2], delta[2, 5], delta[0, 7] = -0.5, 0.01, math.nan
    assert columns_that_count(delta, torch.tensor([9, 9, 2]), 1e-3).tolist() == [2, 5, 7, 9]
    assert columns_that_count(delta, torch.tensor([9, 9, 2]), 1e-5) is None  # all of them: nothing to gain
    assert columns_that_count(delta, torch.tensor([9, 9, 2]), 0.0) is None


@pytest.mark.parametrize("rows", [None, 12], ids=["all fits", "group by group"])
@dtypes
def test_the_preference_loss_takes_it_too(dtype, rows, backend, device):
    hidden, weight, target = trained(dtype, device)
    hidden, labels = hidden.view(6, 8, D), target.view(6, 8)
    results = []
    for eps in (None, 1e-3):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        out = linear_wrpo_loss(
            *leaves, labels, alpha=0.3, beta=0.1, grad_filter=eps, budget_bytes=budget(rows, dtype), backend=backend
        )
        results.append((out, *torch.autograd.grad(out.loss, leaves)))
    (exact, *exact_grads), (out, *grads) = results
    for name, got, expected in zip(out._fields, out, exact, strict=True):
        oracle.assert_same_bits(name, got, expected)
    for got, expected in zip(grads, exact_grads, strict=True):
        difference = (got.double() - expected.double()).norm() / expected.double().norm()
        assert 0 < difference < 0.1


def test_it_compiles_into_one_graph():
    hidden, weight, target = trained(torch.float32)
    torch._dynamo.reset()

    def run(function):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    def door(h, w):
        return linear_token_logp(h, w, target, grad_filter=1e-3)

    for got, expected in zip(run(torch.compile(door, fullgraph=True, backend="aot_eager")), run(door), strict=True):
        oracle.assert_same_bits("gradient", got, expected)


WRONG = [(0.0, ValueError), (-1e-3, ValueError), (math.nan, ValueError), (True, TypeError), ("1", TypeError)]


@pytest.mark.parametrize(("eps", "error"), WRONG)
def test_a_wrong_bound_is_named(eps, error):
    hidden, weight, target = trained(torch.float32)
    with pytest.raises(error, match="grad_filter"):
        linear_token_logp(hidden, weight, target, grad_filter=eps)
    with pytest.raises(error, match="grad_filter"):
        linear_preference_loss(
            hidden[None],
            weight,
            target[None],
            seq_weight=torch.ones(1),
            group=torch.zeros(1).long(),
            beta=0.1,
            grad_filter=eps,
        )
