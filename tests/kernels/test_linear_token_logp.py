"""`linear_token_logp`: values and gradients against float64, one gradient at a time, and what a call may cost."""

from __future__ import annotations

import itertools
import math
import os

import cases
import oracle
import pytest
import torch
import torch.distributed as distributed
from cases import DTYPES, Case
from cost import budget_of, measured, product_flops
from fuzz import backends_here
from oracle import Transform
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from wrpo_kernels import linear_token_logp
from wrpo_kernels.lm_head import products

EVERY = {**cases.SHAPES, **cases.VALUES, **cases.LAYOUTS}
BUDGETS = {"all rows fit": None, "one row at a time": 1}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
budgets = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())


def gradients_of(function, tensors: dict[str, Tensor], wanted: set[str], c: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of `function(**tensors)` and its gradients with respect to `wanted` alone."""
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    value = function(**given)
    return value, oracle.gradients(value, {name: given[name] for name in tensors if name in wanted}, c)


def check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    transform: Transform,
    backend: str,
    wanted: set[str] | None = None,
    **options,
) -> None:
    """Values and the wanted gradients (all of them unless said) by the error rule."""
    c = cases.cotangent(target)
    tensors = {"hidden": hidden, "weight": weight} | ({} if transform.bias is None else {"bias": transform.bias})
    wanted = wanted or set(tensors)
    rest = {name: value for name, value in transform._asdict().items() if name != "bias"}
    passes = 1 if options.get("budget_bytes") is None else target.numel()
    truth = oracle.linear_truth(hidden, weight, target, c, transform, passes=passes)

    def ours(hidden, weight, bias=None):
        return linear_token_logp(hidden, weight, target, bias=bias, backend=backend, **rest, **options)

    def plain(hidden, weight, bias=None):
        return oracle.plain_linear_token_logp(hidden, weight, target, transform._replace(bias=bias))

    got, grads = gradients_of(ours, tensors, wanted, c)
    plain_logp, plain_grads = gradients_of(plain, tensors, wanted, c)
    assert got.dtype == torch.float32
    assert (got <= 0).all()
    oracle.assert_rule("logp", got, truth.logp, plain_logp, truth.slack["logp"])
    for name in wanted:
        assert grads[name].dtype == tensors[name].dtype
        oracle.assert_rule(f"grad_{name}", grads[name], truth.grads[name], plain_grads[name], truth.slack[name])


@dtypes
@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
def test_values_and_gradients_are_as_good_as_plain_torch(case: Case, dtype, backend, device):
    check(*cases.hidden_of(case, dtype, device), Transform(), backend)


@dtypes
@pytest.mark.parametrize("name", ["empty", "primes", "batch", "just over a block"])
def test_one_row_at_a_time_is_as_good(name, dtype, backend, device):
    check(*cases.hidden_of(cases.SHAPES[name], dtype, device), Transform(), backend, budget_bytes=1)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 10, 11])
def test_any_share_of_the_rows_may_fit(rows, backend, device):
    """Ten rows count: those that fit keep their delta, the others pass in chunks that may end unevenly."""
    case = cases.SHAPES["primes"]
    hidden, weight, target = cases.hidden_of(case, torch.bfloat16, device)
    budget = budget_of(rows, case.vocabulary, case.width, torch.bfloat16)
    check(hidden, weight, target, Transform(bias=weight[:, 0].contiguous()), backend, budget_bytes=budget)
    check(hidden, weight, target, Transform(), backend, {"hidden"}, budget_bytes=budget)


@pytest.mark.parametrize("rows", [None, 9], ids=["all rows fit", "chunks"])
def test_a_head_that_is_taken_in_stripes_is_as_good(rows, backend, device, monkeypatch):
    """[V, D] and [V, rows] beyond what a stripe of a product may take, here of 64 KiB."""
    monkeypatch.setattr(products, "STRIPE_BYTES", 1 << 16)
    case = Case("V and D share no factor with any stripe", (54,), 1033, width=53)
    assert products.stripe_of(54, torch.bfloat16) < 1033, "one stripe would be the whole head"
    budget = None if rows is None else budget_of(rows, case.vocabulary, case.width, torch.bfloat16)
    hidden, weight, target = cases.hidden_of(case, torch.bfloat16, device)
    check(hidden, weight, target, Transform(), backend, budget_bytes=budget)


@dtypes
@budgets
@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_the_transform_of_the_logits_is_applied_in_the_order_of_the_models(name, budget, dtype, backend, device):
    case = Case("a tail", (6,), 131)
    transform = cases.TRANSFORMS[name](torch.randn(131, device=device).to(dtype))
    check(*cases.hidden_of(case, dtype, device), transform, backend, budget_bytes=budget)


NAMES = ("hidden", "weight", "bias")
SUBSETS = [set(subset) for count in (1, 2, 3) for subset in itertools.combinations(NAMES, count)]


@budgets
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)))
def test_each_gradient_alone_is_as_good_as_plain_torch(wanted, budget, backend, device):
    case = Case("", (2, 9), 257, width=20)
    transform = Transform(bias=torch.randn(257, device=device).bfloat16(), softcap=20.0)
    check(*cases.hidden_of(case, torch.bfloat16, device), transform, backend, wanted, budget_bytes=budget)


@pytest.mark.parametrize("wanted", [set(), *SUBSETS], ids=lambda wanted: "+".join(sorted(wanted)) or "none")
def test_only_what_requires_grad_gets_one(wanted, backend, device):
    hidden, weight, target = cases.hidden_of(Case(""), torch.float32, device)
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(61, device=device)}
    for name in wanted:
        tensors[name].requires_grad_()
    logp = linear_token_logp(hidden, weight, target, bias=tensors["bias"], backend=backend)
    assert logp.requires_grad == bool(wanted)
    if wanted:
        logp.sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == wanted


MIXED = [(a, b) for a, b in itertools.product(DTYPES, DTYPES) if a != b]


@budgets
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), MIXED, ids=str)
def test_each_gradient_has_the_dtype_of_its_tensor(hidden_dtype, weight_dtype, budget, backend, device):
    """The products run in the type of the hidden states, into which the weight is rounded first."""
    hidden, weight, target = cases.hidden_of(Case("", (11,), 131), hidden_dtype, device)
    weight, bias, c = weight.to(weight_dtype), torch.randn(131, device=device).to(weight_dtype), cases.cotangent(target)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    got, grads = gradients_of(
        lambda **given: linear_token_logp(target=target, budget_bytes=budget, backend=backend, **given),
        tensors,
        set(tensors),
        c,
    )
    rounded = weight.to(hidden_dtype)
    truth = oracle.linear_truth(hidden, rounded, target, c, Transform(bias=bias))
    plain, plain_grads = gradients_of(
        lambda hidden, weight, bias: oracle.plain_linear_token_logp(hidden, weight, target, Transform(bias=bias)),
        tensors | {"weight": rounded},
        set(tensors),
        c,
    )
    oracle.assert_rule("logp", got, truth.logp, plain, truth.slack["logp"])
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        slack = truth.slack[name] + oracle.ulp(truth.grads[name], grad.dtype)  # the last conversion
        slack = slack + 0.5 * oracle.ulp(truth.grads[name], hidden_dtype)  # a single pass rounds to the products' type
        oracle.assert_rule(f"grad_{name}", grad, truth.grads[name], plain_grads[name], slack)


@budgets
@dtypes
def test_errors_lean_to_neither_side(dtype, budget, backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (257,), 1031, width=64), dtype, device)
    c = torch.full(target.shape, 1 + 2**-8 - 2**-12, device=device)  # rounds up in bfloat16: the worst gain
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(1031, device=device).to(dtype)}
    truth = oracle.linear_truth(hidden, weight, target, c, Transform(bias=tensors["bias"]))
    got, grads = gradients_of(
        lambda **given: linear_token_logp(target=target, budget_bytes=budget, backend=backend, **given),
        tensors,
        set(tensors),
        c,
    )
    plain, plain_grads = gradients_of(
        lambda hidden, weight, bias: oracle.plain_linear_token_logp(hidden, weight, target, Transform(bias=bias)),
        tensors,
        set(tensors),
        c,
    )
    counts = target != -100
    kept = 0.5 * float(oracle.ulp(torch.tensor(10.0), torch.float32))  # half an ulp of the log-sum-exp
    oracle.assert_unbiased(
        "logp", got[counts], truth.logp[counts], plain[counts], floor=0.1 * torch.finfo(torch.float32).eps
    )
    oracle.assert_typical("logp", got[counts], truth.logp[counts], plain[counts], floor=kept)
    for name, grad in grads.items():
        size = float(truth.grads[name].square().mean().sqrt())
        oracle.assert_unbiased(f"grad_{name}", grad, truth.grads[name], plain_grads[name], floor=kept)
        oracle.assert_typical(f"grad_{name}", grad, truth.grads[name], plain_grads[name], floor=kept * size)


def test_the_error_of_the_weight_gradient_does_not_grow_with_the_number_of_passes(backend, device):
    """512 rows that all push the same way: in a bfloat16 total the late ones would be lost."""
    hidden, weight, _ = cases.hidden_of(Case("", (512,), 67, width=16), torch.bfloat16, device)
    hidden, target = hidden.abs(), torch.full((512,), 3, device=device)
    weight[3] = -1.0  # an unlikely token, so that delta stays near 1
    c = torch.ones(512, device=device)
    truth = oracle.linear_truth(hidden, weight, target, c, Transform()).grads["weight"]
    errors = []
    for budget in (None, 1):
        given = {"hidden": hidden, "weight": weight}
        _, grads = gradients_of(
            lambda budget=budget, **given: linear_token_logp(
                target=target, budget_bytes=budget, backend=backend, **given
            ),
            given,
            {"weight"},
            c,
        )
        errors.append(float((grads["weight"].double() - truth).norm() / truth.norm()))
    assert errors[1] <= 1.5 * errors[0]


@dtypes
@budgets
def test_small_gradients_are_not_lost(budget, dtype, backend, device):
    """Rows whose cotangents span eight decades: each keeps its own norm."""
    hidden, weight, target = cases.hidden_of(Case("", (9,), 131, target="ends"), dtype, device)
    c = 10.0 ** torch.arange(-6, 3, device=device).float()
    if dtype == torch.float16:
        c = c.clamp(min=1e-1)  # below, float16 itself has no bits left
    truth = oracle.linear_truth(hidden, weight, target, c, Transform()).grads["hidden"]
    _, grads = gradients_of(
        lambda **given: linear_token_logp(target=target, budget_bytes=budget, backend=backend, **given),
        {"hidden": hidden, "weight": weight},
        {"hidden", "weight"},
        c,
    )
    ratio = grads["hidden"].double().norm(dim=1) / truth.norm(dim=1)
    assert (ratio - 1).abs().max() < 4 * torch.finfo(dtype).eps


@budgets
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_what_stands_in_ignored_positions_reaches_nothing(frozen, budget, backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (3, 7), 131), torch.bfloat16, device)
    ignored = target == -100
    dirty = hidden.clone()
    dirty[ignored] = torch.nan
    c, results = cases.cotangent(target), []
    dirty_c = c.masked_fill(ignored, torch.nan)
    wanted = {"hidden"} if frozen else {"hidden", "weight"}
    for h, cotangent in ((hidden, c), (dirty, dirty_c)):
        results.append(
            gradients_of(
                lambda **given: linear_token_logp(target=target, budget_bytes=budget, backend=backend, **given),
                {"hidden": h, "weight": weight},
                wanted,
                cotangent,
            )
        )
    (clean_logp, clean), (logp, grads) = results
    oracle.assert_same_bits("logp", logp, clean_logp)
    assert not logp[ignored].any()
    assert not grads["hidden"][ignored].any()  # exactly 0, and NaN would count as True
    for name in wanted:
        oracle.assert_same_bits(f"grad_{name}", grads[name], clean[name])


def test_nan_stays_in_its_own_row(backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (6,), 131, target="ends"), torch.float32, device)
    hidden[2, 3] = torch.nan
    logp, grads = gradients_of(
        lambda **given: linear_token_logp(target=target, backend=backend, **given),
        {"hidden": hidden, "weight": weight},
        {"hidden"},
        torch.ones(6, device=device),
    )
    others = torch.arange(6, device=device) != 2
    assert logp[2].isnan()
    assert logp[others].isfinite().all()
    assert grads["hidden"][others].isfinite().all()


@budgets
def test_padded_and_packed_rows_give_the_same(budget, backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (3, 7), 131), torch.float32, device)
    packed = target != -100
    padded_logp = linear_token_logp(hidden, weight, target, budget_bytes=budget, backend=backend)
    packed_logp = linear_token_logp(hidden[packed], weight, target[packed], budget_bytes=budget, backend=backend)
    oracle.assert_same_bits("logp", padded_logp[packed], packed_logp)


@budgets
@pytest.mark.parametrize("layout", ["contiguous", *cases.LAYOUTS])
def test_inputs_are_not_changed_nor_what_lies_between_them(layout, budget, backend, device):
    tensors = cases.hidden_of(cases.LAYOUTS.get(layout, Case("")), torch.float32, device)
    storages = [torch.empty(0, dtype=x.dtype, device=device).set_(x.untyped_storage()) for x in tensors]
    before = [storage.clone() for storage in storages]
    hidden, weight, target = tensors
    logp = linear_token_logp(
        hidden.detach().requires_grad_(), weight.detach().requires_grad_(), target, budget_bytes=budget, backend=backend
    )
    logp.sum().backward()
    for name, storage, old in zip(("hidden", "weight", "target"), storages, before, strict=True):
        oracle.assert_same_bits(name, storage, old)


@budgets
@dtypes
def test_a_second_run_gives_the_same_bits(dtype, budget, backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (33,), 4097, width=33), dtype, device)
    tensors, c = {"hidden": hidden, "weight": weight}, cases.cotangent(target)
    runs = [
        gradients_of(
            lambda **given: linear_token_logp(target=target, budget_bytes=budget, backend=backend, **given),
            tensors,
            set(tensors),
            c,
        )
        for _ in range(2)
    ]
    oracle.assert_same_bits("logp", runs[0][0], runs[1][0])
    for name in tensors:
        oracle.assert_same_bits(f"grad_{name}", runs[0][1][name], runs[1][1][name])


@budgets
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_graph_can_be_walked_twice(frozen, budget, backend, device):
    hidden, weight, target = cases.hidden_of(Case("", (9,), 131), torch.bfloat16, device)
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    c, other = cases.cotangent(target), cases.cotangent(target)
    logp = linear_token_logp(hidden, weight, target, budget_bytes=budget, backend=backend)
    first = torch.autograd.grad(logp, leaves, c, retain_graph=True)
    torch.autograd.grad(logp, leaves, other, retain_graph=True)
    again = torch.autograd.grad(logp, leaves, c)
    for a, b in zip(first, again, strict=True):
        oracle.assert_same_bits("grad", b, a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(logp, leaves, c)


def test_inference_mode_is_no_grad(backend, device):
    hidden, weight, target = cases.hidden_of(Case(""), torch.float32, device)
    expected = linear_token_logp(hidden, weight, target, backend=backend)
    with torch.inference_mode():
        logp = linear_token_logp(hidden.requires_grad_(), weight, target, backend=backend)
    assert not logp.requires_grad
    oracle.assert_same_bits("logp", logp, expected)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_an_input_that_changed_before_the_backward_is_an_error(name, backend, device):
    hidden, weight, target = cases.hidden_of(Case(""), torch.float32, device)
    tensors = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    logp = linear_token_logp(target=target, backend=backend, **tensors)
    with torch.no_grad():
        tensors[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


N, D, V = 32, 32, 1024  # rows that count, of the cost tests
UNIT = 2 * N * D * V  # flops of one product
BUDGET_ROWS = (32, 31, 24, 16, 4, 1)


def cost(budget: int | None, wanted: set[str], backend: str, device: torch.device, backward: bool = True) -> float:
    """Flops of a forward, and of its backward where anything is wanted, in products of the rows that count."""
    hidden, weight = torch.randn(3 * N, D, device=device), torch.randn(V, D, device=device)
    target = torch.randint(0, V, (3 * N,), device=device)
    target[: 2 * N] = -100
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.zeros(V, device=device)}
    for name in wanted:
        tensors[name].requires_grad_()

    def call():
        bias = tensors["bias"] if "bias" in wanted else None
        logp = linear_token_logp(hidden, weight, target, bias=bias, budget_bytes=budget, backend=backend)
        if wanted and backward:
            logp.sum().backward()

    return product_flops(call) / UNIT


@budgets
def test_the_forward_alone_is_one_product(budget, backend, device):
    assert cost(budget, set(), backend, device) == 1


@budgets
def test_no_grad_computes_no_gradient_even_of_tensors_that_require_it(budget, backend, device):
    with torch.no_grad():
        assert cost(budget, {"hidden", "weight"}, backend, device, backward=False) == 1


@budgets
def test_a_frozen_head_is_two_products_whatever_the_budget(budget, backend, device):
    assert cost(budget, {"hidden"}, backend, device) == 2


def test_a_trained_head_is_three_products_while_the_rows_fit(backend, device):
    assert cost(None, {"hidden", "weight"}, backend, device) == 3
    assert cost(None, {"weight"}, backend, device) == 2


def test_a_bias_costs_a_vector_product_at_most(backend, device):
    assert cost(None, {"hidden", "weight", "bias"}, backend, device) <= 3 + 1 / D
    assert cost(None, {"bias"}, backend, device) <= 1 + 1 / D


def test_the_cost_grows_smoothly_as_the_budget_shrinks(backend, device):
    """Rows that do not fit are computed once more; never more than that."""
    budgets = [budget_of(rows, V, D, torch.float32) for rows in BUDGET_ROWS]
    costs = [cost(budget, {"hidden", "weight"}, backend, device) for budget in budgets]
    assert costs[0] == 3
    assert costs == sorted(costs)
    assert costs[-1] <= 4
    for rows, flops in zip(BUDGET_ROWS, costs, strict=True):
        # A quarter of the budget is worked in, and a chunk is at least a row.
        assert flops <= 3 + (1 if rows == 1 else 1 - (0.75 * rows - 1) / N)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_within_the_budget_and_does_not_grow_with_the_rows():
    backends = backends_here()
    measures = measured(f"""
        from wrpo_kernels import linear_token_logp
        V, D, MiB = 8192, 64, 1 << 20
        result = {{}}
        weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_()
        for backend in {backends}:
            for rows in (64, 512, 2048):
                hidden = torch.randn(rows, D, dtype=torch.bfloat16).requires_grad_()
                target = torch.randint(0, V, (rows,))
                for kind in ("no_grad", "frozen", "trained"):
                    def call():
                        with torch.set_grad_enabled(kind != "no_grad"):
                            w = weight.detach() if kind == "frozen" else weight
                            logp = linear_token_logp(hidden, w, target, budget_bytes=4 * MiB, backend=backend)
                        leaves = [hidden] + [weight] * (kind == "trained")
                        return logp.detach(), kind == "no_grad" or torch.autograd.grad(logp.sum(), leaves)
                    result[f"{{backend}} {{kind}} {{rows}}"] = growth(call) / MiB
    """)
    gradients = {"no_grad": 0, "frozen": 0.25, "trained": 0.25 + 1 + 2}  # of a trained head its float32 total too
    for name, megabytes in measures.items():
        _, kind, rows = name.split()
        if rows != "64":  # the first calls: what the library and the matrix products set up once
            assert megabytes <= 4 + 32 + gradients[kind], f"{name} rows: {megabytes:.0f} MiB; all: {measures}"
    for backend, kind in itertools.product(backends, gradients):  # the logits of 1536 rows more would be 24 MiB more
        assert measures[f"{backend} {kind} 2048"] <= measures[f"{backend} {kind} 512"] + 6, measures


GOOD = {
    "hidden": torch.zeros(2, 3, 4),
    "weight": torch.zeros(5, 4),
    "target": torch.zeros(2, 3, dtype=torch.int64),
}
REFUSED = {
    "hidden of another type": ({"hidden": [[0.0]]}, TypeError, "hidden.*list"),
    "integer hidden": ({"hidden": torch.zeros(2, 3, 4).long()}, ValueError, "hidden.*int64"),
    "hidden of another width": ({"hidden": torch.zeros(2, 3, 6)}, ValueError, r"hidden.*D=4.*\[2, 3, 6\]"),
    "scalar hidden": ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden.*\[\]"),
    "weight of another type": ({"weight": None}, TypeError, "weight.*NoneType"),
    "weight a vector": ({"weight": torch.zeros(4)}, ValueError, r"weight.*\[V, D\].*\[4\]"),
    "weight without a width": ({"weight": torch.zeros(9, 0)}, ValueError, r"weight.*D >= 1.*\[9, 0\]"),
    "softcap beyond float32": ({"softcap": 1e300}, ValueError, "softcap.*float32.*1e\\+300"),
    "temperature below float32": ({"temperature": 1e-300}, ValueError, "temperature.*float32.*1e-300"),
    "ignore_index beyond int64": ({"ignore_index": 2**70}, ValueError, "ignore_index.*int64.*71 bits"),
    "weight without a vocabulary": ({"weight": torch.zeros(0, 4)}, ValueError, r"weight.*V >= 1.*\[0, 4\]"),
    "weight elsewhere": ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "weight.*cpu.*meta"),
    "integer weight": ({"weight": torch.zeros(5, 4).char()}, ValueError, "weight.*int8"),
    "sparse weight": ({"weight": torch.zeros(5, 4).to_sparse()}, ValueError, "weight.*dense.*sparse_coo.*to_dense"),
    "jagged hidden": (
        {"hidden": torch.nested.nested_tensor([torch.zeros(3, 4)], layout=torch.jagged)},
        ValueError,
        "hidden.*dense.*nested.*to_padded_tensor",
    ),
    "nested hidden": (
        {"hidden": torch.nested.nested_tensor([torch.zeros(3, 4)])},
        ValueError,
        "hidden.*dense.*nested.*to_padded_tensor",
    ),
    "scale over temperature beyond float32": (
        {"logit_scale": 1e20, "temperature": 1e-20},
        ValueError,
        r"logit_scale / temperature.*float32.*1e\+40",
    ),
    "float target": ({"target": torch.zeros(2, 3)}, ValueError, "target.*int64.*float32"),
    "int16 target": ({"target": torch.zeros(2, 3).short()}, ValueError, "target.*int64.*int16"),
    "target of another shape": ({"target": torch.zeros(6).long()}, ValueError, r"target.*\[2, 3\].*\[6\]"),
    "target elsewhere": ({"target": torch.zeros(2, 3).long().to("meta")}, ValueError, "target.*cpu.*meta"),
    "target = V": ({"target": torch.full((2, 3), 5)}, ValueError, "target.*V ?= ?5.*5"),
    "target = -1": ({"target": torch.full((2, 3), -1)}, ValueError, "target.*-1"),
    "bias of another shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[V\].*\[5\].*\[4\]"),
    "integer bias": ({"bias": torch.zeros(5).int()}, ValueError, "bias.*int32"),
    "negative softcap": ({"softcap": -30.0}, ValueError, "softcap.*-30"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature.*> 0.*0"),
    "NaN scale": ({"logit_scale": math.nan}, ValueError, "logit_scale.*nan"),
    "scale a flag": ({"logit_scale": True}, TypeError, "logit_scale.*bool"),
    "no budget": ({"budget_bytes": 0}, ValueError, "budget_bytes.*> 0.*0"),
    "negative budget": ({"budget_bytes": -1}, ValueError, "budget_bytes.*-1"),
    "budget a fraction": ({"budget_bytes": 1.5}, TypeError, "budget_bytes.*float"),
    "budget as text": ({"budget_bytes": "1GB"}, TypeError, "budget_bytes.*str"),
    "ignore_index a fraction": ({"ignore_index": 0.5}, TypeError, "ignore_index"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend.*native.*reference.*'fast'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        linear_token_logp(**{**GOOD, **changes})


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_a_tensor_that_is_spread_over_processes_is_refused_with_the_way_out(name):
    """As FSDP2 and tensor parallelism leave a weight outside of the module that they wrap."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        spread = distribute_tensor(GOOD[name], mesh, [Shard(0)])
        with pytest.raises(
            ValueError, match=rf"{name} must be a whole tensor, got a DTensor; pass {name}\.full_tensor"
        ):
            linear_token_logp(**{**GOOD, name: spread})
    finally:
        distributed.destroy_process_group()


@budgets
def test_the_position_of_a_wrong_target_is_the_users(budget, backend, device):
    """Not its number among the rows that count, nor within a chunk."""
    hidden, weight, target = cases.hidden_of(Case("", (12,), 31, target="ends"), torch.float32, device)
    target[:6] = -100
    target[9] = 31
    read = torch.autograd.set_detect_anomaly(device.type == "cuda")  # there the kernels read targets only when asked
    with read, pytest.raises(ValueError, match=r"target\[9\].*V ?= ?31.*31"):
        linear_token_logp(hidden, weight, target, budget_bytes=budget, backend=backend)
