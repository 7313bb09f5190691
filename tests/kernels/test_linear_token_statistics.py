"""`linear_token_statistics`: each statistic and its gradient against float64, its log-probs beside the other op's."""

from __future__ import annotations

import cases
import oracle
import pytest
import torch
from cases import DTYPES, Case
from conftest import HERE
from cost import product_flops
from oracle import Transform
from torch import Tensor

from wrpo_kernels import TokenStatistics, linear_token_logp, linear_token_statistics

PLACES = HERE
NAMES = TokenStatistics._fields
TRAINED = ("logp", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
budgets = pytest.mark.parametrize("budget", [None, 4096, 1], ids=["all rows fit", "some do", "one row at a time"])


def truth(hidden: Tensor, weight: Tensor, target: Tensor, transform: Transform, ignore_index: int = -100) -> dict:
    """The formulas in the dtype of what is given, on whole logits."""
    counts = (target != ignore_index)[..., None]
    scores = transform(hidden.where(counts, 0.0) @ weight.T, transform.bias)
    log_share = scores.log_softmax(-1)
    share = log_share.exp()
    found = {
        "logp": oracle.pick(scores, target, ignore_index),
        "entropy": -(share * log_share).where(share > 0, 0.0).sum(-1),
        "lse": scores.logsumexp(-1),
        "mean_logits": scores.mean(-1),
        "log_sum_sq_probs": (2 * log_share).logsumexp(-1),
    }
    return {name: value.where(counts[..., 0], 0.0) for name, value in found.items()} | {
        "top1": scores.argmax(-1).where(counts[..., 0], -1)
    }


def wide(backend: str) -> tuple[torch.dtype, dict[str, float], dict[str, float]]:
    """The widest type of a backend, and how near to float64 its values and gradients are."""
    if backend == "reference":
        return torch.float64, {"rtol": 1e-10, "atol": 1e-12}, {"rtol": 1e-8, "atol": 1e-10}
    return torch.float32, {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-4, "atol": 1e-5}


def doubled(leaves: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def problem(case: Case, dtype: torch.dtype, device: torch.device, has_bias: bool = True):
    hidden, weight, target = cases.hidden_of(case, dtype, device)
    hidden = hidden.masked_fill((target == -100)[..., None], torch.nan)
    bias = torch.randn(case.vocabulary, device=device).to(dtype) if has_bias else None
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    return leaves, target, bias


@pytest.mark.parametrize("name", cases.TRANSFORMS)
@budgets
def test_values_and_each_gradient_alone_are_the_formulas(name, budget, backend, device):
    case = Case("", (2, 7), 61)
    dtype, near, near_gradient = wide(backend)
    given, target, bias = problem(case, dtype, device)
    transform = cases.TRANSFORMS[name](bias)
    got = linear_token_statistics(*given[:2], target, budget_bytes=budget, backend=backend, **transform._asdict())
    exact = doubled(given)
    expected = truth(*exact[:2], target, transform._replace(bias=None if transform.bias is None else exact[2]))
    assert torch.equal(got.top1, expected["top1"])
    count = 2 if transform.bias is None else 3
    for what in TRAINED:
        torch.testing.assert_close(getattr(got, what).double(), expected[what], **near, msg=what)
        c = torch.randn_like(expected[what])
        ours = torch.autograd.grad(getattr(got, what), given[:count], c.to(dtype), retain_graph=True)
        right = torch.autograd.grad(expected[what], exact[:count], c, retain_graph=True)
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a.double(), b, **near_gradient, msg=what)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 4097, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_computes_the_same(vocabulary, dtype):
    native_rows = pytest.importorskip("native_rows", reason="the native module was not built")
    given, target, bias = problem(Case("", (5,), vocabulary, width=8), dtype, torch.device("cpu"))
    options = {"bias": bias, "softcap": 5.0, "temperature": 0.7}
    c = torch.randn(5, 5)
    results = {}
    for level in (*native_rows.each_level(), "reference"):
        backend = "reference" if level == "reference" else "native"
        found = linear_token_statistics(*given[:2], target, backend=backend, **options)
        values = torch.stack([getattr(found, name) for name in TRAINED])
        results[level] = (values.detach(), found.top1, *torch.autograd.grad(values, given, c))
    reference = results.pop("reference")
    eps = torch.finfo(dtype).eps
    for level, (values, top1, *grads) in results.items():
        torch.testing.assert_close(values, reference[0], rtol=1e-5, atol=1e-5, msg=level)
        assert (top1 == reference[1]).all(), level
        for got, expected in zip(grads, reference[2:], strict=True):
            torch.testing.assert_close(
                got, expected, rtol=8 * eps, atol=16 * eps * float(expected.abs().max()), msg=level
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.VALUES.values(), ids=cases.VALUES.keys())
def test_errors_are_those_of_the_rounded_logits(case, dtype, backend, device):
    """Truth from logits that are rounded as the products round them: what is left is float32 arithmetic."""
    (hidden, weight), target, _ = problem(case, dtype, device, has_bias=False)
    got = linear_token_statistics(hidden, weight, target, backend=backend)
    rounded = hidden.detach().nan_to_num() @ weight.detach().T
    eye = torch.eye(case.vocabulary, dtype=torch.float64, device=device)
    expected = truth(rounded.double(), eye, target, Transform())
    size = rounded.double().abs().amax(-1)
    for name in TRAINED:
        allowed = 8 * oracle.ulp(size, torch.float32) + 2e-6
        if dtype == torch.float32:  # the truth's product is another one's
            allowed = allowed + oracle.ulp(size, torch.float32) * case.width**0.5
        assert ((getattr(got, name) - expected[name]).abs() <= allowed).all(), name
    assert ((got.entropy >= -2e-6) & (got.logp <= 0)).all()


@budgets
def test_a_loss_of_all_statistics_has_the_gradients_of_plain_torch_in_16_bits(budget, backend, device):
    case = Case("", (19,), 131, width=24)
    (hidden, weight), target, _ = problem(case, torch.bfloat16, device, has_bias=False)
    c = {name: torch.randn(target.shape, device=device, dtype=torch.float64) for name in TRAINED}

    def loss(found: dict) -> Tensor:
        return sum((c[name] * found[name].double()).sum() for name in TRAINED)

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(loss(truth(*wide, target, Transform())), wide)
    plain_leaves = [x.detach().clone().requires_grad_() for x in (hidden.nan_to_num(), weight)]
    scores = plain_leaves[0] @ plain_leaves[1].T
    plain = torch.autograd.grad(loss(truth(scores.float(), torch.eye(131), target, Transform())), plain_leaves)
    found = linear_token_statistics(hidden, weight, target, budget_bytes=budget, backend=backend)
    got = torch.autograd.grad(loss(found._asdict()), [hidden, weight])
    for ours, theirs, right in zip(got, plain, exact, strict=True):
        error, plain_error = ((x.double() - right).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 1.5 * plain_error


def test_an_entropy_bonus_of_tiny_upstream_gradients_survives_float16(backend, device):
    case = Case("", (9,), 131)
    (hidden, weight), target, _ = problem(case, torch.float16, device, has_bias=False)
    found = linear_token_statistics(hidden, weight.detach(), target, outputs=("entropy",), backend=backend)
    c = 1e-3 * torch.rand_like(found.entropy)
    (got,) = torch.autograd.grad(found.entropy, [hidden], c)
    wide = hidden.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(truth(wide, weight.detach().double(), target, Transform())["entropy"], [wide], c)
    counts = target != -100
    ratio = got[counts].double().norm(dim=1) / right[counts].norm(dim=1)
    assert (ratio - 1).abs().max() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_log_probs_are_those_of_the_other_op_bit_for_bit(dtype, backend, device):
    (hidden, weight), target, _ = problem(Case("", (3, 5), 257), dtype, device, has_bias=False)
    options = {"softcap": 7.0, "temperature": 0.8, "backend": backend, "shift": True}
    got = linear_token_statistics(hidden, weight, target, outputs=(), **options)
    oracle.assert_same_bits("logp", got.logp, linear_token_logp(hidden, weight, target, **options))
    assert [x is None for x in got] == [False, *[True] * 6]


def test_tokens_that_a_mask_excludes_have_no_share_and_no_gradient(backend, device):
    dtype, near, _ = wide(backend)
    given, target, _ = problem(Case("", (8,), 61, target="ends"), dtype, device, has_bias=False)
    bias = torch.zeros(61, dtype=dtype, device=device)
    bias[20:40] = -torch.inf
    found = linear_token_statistics(*given, target, bias=bias, backend=backend)
    hidden, weight = doubled(given)
    kept = [*range(20), *range(40, 61)]
    expected = truth(hidden, weight[kept], target.where(target < 20, target - 20), Transform())
    for name in ("logp", "entropy", "lse", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(found, name).double(), expected[name], **near, msg=name)
    grad = torch.autograd.grad((found.entropy + found.lse + found.log_sum_sq_probs).sum(), given)
    assert all(g.isfinite().all() for g in grad)
    assert not grad[1][20:40].any()


def test_the_first_of_equal_logits_is_the_top_one(backend, device):
    hidden, weight = torch.ones(2, 1, device=device), torch.tensor([[0.0], [3.0], [1.0], [3.0]], device=device)
    found = linear_token_statistics(hidden, weight, torch.tensor([3, -100], device=device), backend=backend)
    assert found.top1.tolist() == [1, -1]


@budgets
def test_an_adapter_on_the_head_is_trained_by_the_entropy_too(budget, backend, device):
    dtype, _, near = wide(backend)
    (hidden, frozen), target, _ = problem(Case("", (11,), 61), dtype, device, has_bias=False)
    low, up = (torch.randn(n, 3, dtype=dtype, device=device) for n in (11, 61))
    given = [x.detach().nan_to_num().requires_grad_() for x in (hidden, low, up)]
    options = {"adapter": (given[1], given[2]), "budget_bytes": budget, "backend": backend}
    found = linear_token_statistics(given[0], frozen.detach(), target, **options)
    exact = doubled(given)
    scores = exact[0] @ frozen.detach().double().T + exact[1] @ exact[2].T
    expected = truth(scores, torch.eye(61, dtype=torch.float64, device=device), target, Transform())
    ours = torch.autograd.grad(found.entropy.sum(), given)
    right = torch.autograd.grad(expected["entropy"].sum(), exact)
    torch.testing.assert_close([x.double() for x in ours], [*right], **near)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_log_probs_of_chosen_ids_are_those_of_whole_logits_with_their_gradients(ids_dtype, backend, device):
    dtype, near, near_gradient = wide(backend)
    given, target, _ = problem(Case("", (3, 4), 61), dtype, device)
    ids = torch.tensor([60, 0, 7, 7], device=device)
    options = {"softcap": 4.0, "temperature": 0.7}
    found = linear_token_statistics(
        *given[:2], target, outputs=(), ids=ids.to(ids_dtype), bias=given[2], backend=backend, **options
    )
    hidden, weight, bias = doubled(given)
    counts = (target != -100)[..., None]
    scores = Transform(**options)(hidden.where(counts, 0.0) @ weight.T, bias)
    expected = scores.log_softmax(-1)[..., ids].where(counts, 0.0)
    torch.testing.assert_close(found.logp_of_ids.double(), expected, **near)
    c = torch.randn_like(expected)
    ours = torch.autograd.grad(found.logp_of_ids, given, c.to(dtype))
    right = torch.autograd.grad(expected, [hidden, weight, bias], c)
    torch.testing.assert_close([x.double() for x in ours], [*right], **near_gradient)


def test_rows_that_fit_are_multiplied_once_and_others_once_more(backend, device):
    case = Case("", (32,), 256, width=32, target="ends")
    (hidden, weight), target, _ = problem(case, torch.float32, device, has_bias=False)
    one = 2 * 32 * 256 * 32

    def step(budget: int | None) -> None:
        linear_token_statistics(hidden, weight, target, budget_bytes=budget, backend=backend).entropy.sum().backward()

    assert product_flops(lambda: step(None)) == 3 * one
    assert product_flops(lambda: step(1)) == 4 * one
    with torch.no_grad():
        assert product_flops(lambda: linear_token_statistics(hidden, weight, target, backend=backend)) == one


def test_it_compiles_into_one_graph(backend, device):
    (hidden, weight), target, _ = problem(Case("", (6,), 31), torch.float32, device, has_bias=False)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_token_statistics(hidden, weight, target, backend=backend)
        return (found.logp + 0.1 * found.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(hidden, weight), [hidden, weight]) for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "entropy"}, "outputs must be names among.*'entropy'"),
        ({"outputs": None}, "outputs must be names among.*None"),
        ({"outputs": iter([[]])}, r"outputs must be names among.*\[\[\]\]"),
        ({"outputs": ("kl",)}, "outputs must be names among.*'kl'"),
        ({"backend": "triton_exp"}, "^backend must be one of.*'triton_exp'"),
        ({"temperature": 0.0}, "temperature"),
        ({"ids": torch.tensor([[1]])}, r"ids must be \[K\], got \[1, 1\]"),
        ({"ids": torch.tensor([5])}, r"ids must lie in \[0, V=5\)"),
        ({"ids": torch.tensor([0.5])}, "ids must be int64"),
    ],
)
def test_a_wrong_argument_is_named_in_the_error(options, message):
    with pytest.raises(ValueError, match=message):
        linear_token_statistics(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2).long(), **options)
