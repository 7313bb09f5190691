"""A LoRA on the head: values and gradients of the longer product [h, low] [W, up]^T, without ever making it."""

from __future__ import annotations

import itertools
import os

import cases
import oracle
import pytest
import torch
from cases import DTYPES, Case
from cost import budget_of, measured, product_flops
from fuzz import backends_here
from oracle import Transform
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp, linear_wrpo_loss

R = 3
BUDGETS = {"all rows fit": None, "four rows fit": 4, "one row at a time": 1}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
budgets = pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS.keys())
NAMES = ("hidden", "weight", "low", "up")
SUBSETS = [set(subset) for count in (1, 2, 3, 4) for subset in itertools.combinations(NAMES, count)]


class Problem:
    """Hidden states, a head and an adapter; what stands in rows that do not count is NaN."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.hidden, self.weight, self.target = cases.hidden_of(case, dtype, device)
        self.low = torch.randn(*case.leading, R).to(dtype).to(device)
        self.up = (torch.randn(case.vocabulary, R) / R).to(dtype).to(device)
        self.ignored = self.target == -100
        self.hidden[self.ignored] = torch.nan
        self.low[self.ignored] = torch.nan
        self.case, self.dtype = case, dtype

    def tensors(self, wanted: set[str]) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach().requires_grad_(name in wanted) for name in NAMES}

    def budget(self, rows: int | None) -> int | None:
        return None if rows is None else budget_of(rows, self.case.vocabulary, self.case.width + R, self.dtype)

    def longer(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """[h, low] and [W, up], with zeros for what does not count."""
        hidden = torch.cat([tensors["hidden"], tensors["low"]], -1).masked_fill(self.ignored[..., None], 0.0)
        return hidden, torch.cat([tensors["weight"], tensors["up"]], 1)

    def parts(self, hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Of anything that has the shapes of the longer operands."""
        width = self.case.width
        return {
            "hidden": hidden[..., :width],
            "weight": weight[:, :width],
            "low": hidden[..., width:],
            "up": weight[:, width:],
        }


def check(problem: Problem, c: Tensor, logp: Tensor, grads: dict[str, Tensor], transform: Transform, passes: int = 1):
    """By the error rule, with float64 of the longer product as the truth and plain torch on it beside."""
    with torch.no_grad():
        hidden, weight = problem.longer(problem.tensors(set()))
        first = hidden.double()[..., problem.case.width :] @ problem.up.double().T
    truth = oracle.linear_truth(hidden, weight, problem.target, c, transform, passes=passes, partial=first)
    leaves = problem.tensors(set(NAMES))
    plain = oracle.plain_linear_token_logp(*problem.longer(leaves), problem.target, transform)
    plain_grads = oracle.gradients(plain, leaves, c)
    oracle.assert_rule("logp", logp, truth.logp, plain, truth.slack["logp"])
    true = problem.parts(truth.grads["hidden"], truth.grads["weight"])
    slack = problem.parts(truth.slack["hidden"], truth.slack["weight"])
    for name, grad in grads.items():
        assert grad.dtype == problem.dtype
        oracle.assert_rule(f"grad_{name}", grad, true[name], plain_grads[name], slack[name])


@dtypes
@budgets
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)))
def test_each_gradient_alone_is_as_good_as_plain_torch(wanted, rows, dtype, backend, device):
    problem = Problem(Case("", (2, 9), 257, width=20), dtype, device)
    c, given = cases.cotangent(problem.target), problem.tensors(wanted)
    transform = Transform(softcap=20.0, logit_scale=0.7)
    options = {"budget_bytes": problem.budget(rows), "backend": backend, "softcap": 20.0, "logit_scale": 0.7}
    logp = linear_token_logp(
        given["hidden"], given["weight"], problem.target, adapter=(given["low"], given["up"]), **options
    )
    grads = oracle.gradients(logp, {name: given[name] for name in wanted}, c)
    check(problem, c, logp, grads, transform, passes=1 if rows is None else problem.target.numel())
    for name in wanted & {"hidden", "low"}:
        assert not grads[name][problem.ignored].any()  # exactly 0, and NaN would count as True


@dtypes
@budgets
@pytest.mark.parametrize("head", [(131, 24), (1031, 257)], ids=["small head", "larger head"])
def test_the_preference_loss_sends_its_coefficients_through_the_adapter(head, rows, dtype, backend, device):
    """The gradients are those of token log-probs under c = d loss / d logp, whichever way the budget leads."""
    problem = Problem(Case("two triples", (6, 7), *head), dtype, device)
    given = problem.tensors(set(NAMES))
    reference = torch.randn(6, device=device) - 20
    out = linear_wrpo_loss(
        given["hidden"], given["weight"], problem.target, reference, adapter=(given["low"], given["up"]),
        alpha=0.3, beta=0.1, budget_bytes=problem.budget(rows), backend=backend,
    )  # fmt: skip
    grads = oracle.gradients(out.loss, given, torch.ones_like(out.loss))
    weights = torch.tensor([0.3, 0.3, 0.7, 0.7, -1.0, -1.0], device=device, dtype=torch.float64)
    c = -0.1 * weights * torch.sigmoid(-out.margin.double()).repeat(3) / 2
    plain = linear_token_logp(
        problem.hidden, problem.weight, problem.target, adapter=(problem.low, problem.up), backend=backend
    )
    check(problem, c[:, None].expand(6, 7), plain, grads, Transform(), passes=problem.target.numel())
    true = plain.double().sum(1)
    slack = 8 * oracle.ulp(true, torch.float32) + 7 * torch.finfo(dtype).eps * 8
    oracle.assert_rule("logp", out.logp, true, true, slack)
    truth = oracle.preference_truth(
        out.logp,
        reference,
        seq_weight=weights.float(),
        group=torch.arange(6, device=device) % 2,
        num_groups=2,
        beta=0.1,
    )
    for field in ("reward", "margin"):
        true = getattr(truth, field)
        oracle.assert_rule(field, getattr(out, field), true, true, oracle.ulp(true, torch.float32))
    loss = truth.loss.mean()
    oracle.assert_rule("loss", out.loss, loss, loss, 3 * oracle.ulp(loss, torch.float32))


def test_an_adapter_of_another_type_is_rounded_to_that_of_the_hidden_states(backend, device):
    """As PEFT keeps it: float32 beside a bfloat16 model; its gradients come back in its own type."""
    problem = Problem(Case("", (9,), 131, target="ends"), torch.bfloat16, device)
    low, up = problem.low.float().requires_grad_(), problem.up.float().requires_grad_()
    logp = linear_token_logp(problem.hidden, problem.weight, problem.target, adapter=(low, up), backend=backend)
    logp.sum().backward()
    same = linear_token_logp(
        problem.hidden, problem.weight, problem.target, adapter=(problem.low, problem.up), backend=backend
    )
    oracle.assert_same_bits("logp", logp, same)
    assert low.grad.dtype == up.grad.dtype == torch.float32


def test_an_adapter_of_another_type_is_rounded_once(backend, device):
    """Values that bfloat16 does not hold count as their nearest."""
    problem = Problem(Case("", (9,), 131, target="ends"), torch.bfloat16, device)
    low, up = (x.float() * (1 + torch.rand(x.shape, device=device) / 64) for x in (problem.low, problem.up))
    assert not torch.equal(low.bfloat16().float(), low)
    logp, same = (
        linear_token_logp(problem.hidden, problem.weight, problem.target, adapter=adapter, backend=backend)
        for adapter in ((low, up), (low.bfloat16(), up.bfloat16()))
    )
    oracle.assert_same_bits("logp", logp, same)


def test_an_adapter_moves_bfloat16_log_probs_by_what_it_is_worth(backend, device):
    """A share far below an ulp of the logits, as of a LoRA that starts to learn, is not rounded away."""
    problem = Problem(Case("", (256,), 512, width=64, target="ends"), torch.bfloat16, device)
    up = (problem.up.double() * 1e-3).bfloat16()
    none = torch.zeros_like(up)
    step, still = (
        linear_token_logp(problem.hidden, problem.weight, problem.target, adapter=(problem.low, x), backend=backend)
        for x in (up, none)
    )
    z = [problem.hidden.double() @ problem.weight.double().T + problem.low.double() @ x.double().T for x in (up, none)]
    true = oracle.pick(z[0], problem.target, -100) - oracle.pick(z[1], problem.target, -100)
    moved = (step - still).double()
    # Each row errs by some ulp of its logits, in no direction: 256 of them leave a slope with this spread around 1.
    spread = float(((moved - true) * true).square().sum().sqrt() / true.square().sum())
    assert abs(float((moved * true).sum() / true.square().sum()) - 1) <= 5 * spread


def test_a_frozen_head_with_an_adapter_costs_two_products_and_three_of_its_rank(backend, device):
    rows, vocabulary, width = 32, 1024, 32
    problem = Problem(Case("", (rows,), vocabulary, width=width, target="ends"), torch.float32, device)
    given = problem.tensors({"hidden", "low", "up"})

    def call():
        adapter = (given["low"], given["up"])
        logp = linear_token_logp(given["hidden"], given["weight"], problem.target, adapter=adapter, backend=backend)
        logp.sum().backward()

    assert product_flops(call) == 2 * rows * vocabulary * (2 * width + 3 * R)


@dtypes
@budgets
def test_a_column_filter_leaves_the_gradients_of_the_adapter_as_they_are(rows, dtype, backend, device):
    problem = Problem(Case("", (24,), 131, width=20, target="ends"), dtype, device)
    c, budget = cases.cotangent(problem.target), problem.budget(rows)
    grads = []
    for eps in (None, 1.0):  # nothing but the targets is as large as that
        given = problem.tensors(set(NAMES))
        logp = linear_token_logp(
            given["hidden"], given["weight"], problem.target, adapter=(given["low"], given["up"]),
            grad_filter=eps, budget_bytes=budget, backend=backend,
        )  # fmt: skip
        grads.append(oracle.gradients(logp, given, c))
    for name in ("low", "up"):
        oracle.assert_same_bits(name, grads[1][name], grads[0][name])
    assert not torch.equal(grads[1]["weight"], grads[0]["weight"])


@dtypes
@budgets
def test_the_graph_can_be_walked_twice(rows, dtype, backend, device):
    problem = Problem(Case("two triples", (6, 7), 131, width=24), dtype, device)
    options = {"budget_bytes": problem.budget(rows), "backend": backend}
    for reduction in ("mean", "none"):
        given = problem.tensors(set(NAMES))
        loss = linear_wrpo_loss(
            given["hidden"], given["weight"], problem.target, adapter=(given["low"], given["up"]),
            alpha=0.1, reduction=reduction, **options,
        ).loss.sum()  # fmt: skip
        first = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
        for name, once, again in zip(given, first, torch.autograd.grad(loss, list(given.values())), strict=True):
            oracle.assert_same_bits(name, again, once)


def test_sequences_padded_and_packed_have_the_same_loss_and_gradients(backend, device):
    problem = Problem(Case("two triples", (6, 7), 131), torch.float32, device)
    counts = ~problem.ignored
    bounds = torch.nn.functional.pad(counts.sum(1).cumsum(0), (1, 0)).int()
    results = []
    for packed in (False, True):
        given = problem.tensors(set(NAMES))
        rows = {name: given[name][counts] if packed else given[name] for name in ("hidden", "low")}
        loss = linear_wrpo_loss(
            rows["hidden"], given["weight"], problem.target[counts] if packed else problem.target,
            adapter=(rows["low"], given["up"]), alpha=0.1, cu_seqlens=bounds if packed else None, backend=backend,
        ).loss  # fmt: skip
        results.append({"loss": loss} | oracle.gradients(loss, given, torch.ones_like(loss)))
    for name, padded in results[0].items():
        oracle.assert_same_bits(name, results[1][name].where(padded != 0, 0.0), padded.where(padded != 0, 0.0))


def test_padded_and_packed_rows_give_the_same(backend, device):
    problem = Problem(Case("", (3, 7), 131), torch.float32, device)
    counts = ~problem.ignored
    padded = linear_token_logp(
        problem.hidden, problem.weight, problem.target, adapter=(problem.low, problem.up), backend=backend
    )
    adapter = (problem.low[counts], problem.up)
    packed = linear_token_logp(
        problem.hidden[counts], problem.weight, problem.target[counts], adapter=adapter, backend=backend
    )
    oracle.assert_same_bits("logp", padded[counts], packed)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_nothing_of_the_size_of_the_head_is_made_for_an_adapter():
    """A copy of this head, or a gradient of it, would be 64 MiB."""
    measures = measured(f"""
        from wrpo_kernels import linear_wrpo_loss
        V, D, r, MiB = 16384, 2048, 8, 1 << 20
        weight, up = torch.randn(V, D, dtype=torch.bfloat16), torch.randn(V, r, dtype=torch.bfloat16).requires_grad_()
        result = {{}}
        for backend in {backends_here()}:
            for steps in (4, 16):  # the first call: what the library and the matrix products set up once
                hidden = torch.randn(3, steps, D, dtype=torch.bfloat16).requires_grad_()
                low = torch.randn(3, steps, r, dtype=torch.bfloat16).requires_grad_()
                labels = torch.randint(0, V, (3, steps))
                def call():
                    options = {{"adapter": (low, up), "budget_bytes": MiB, "backend": backend}}
                    loss = linear_wrpo_loss(hidden, weight, labels, alpha=0.1, **options).loss
                    return torch.autograd.grad(loss, [hidden, low, up])
                result[f"{{backend}} {{steps}}"] = growth(call) / MiB
    """)
    for backend in backends_here():
        assert measures[f"{backend} 16"] <= 1 + 32, measures


@pytest.mark.parametrize(
    ("adapter", "error", "words"),
    [
        (torch.ones(4, 2), TypeError, r"adapter must be a pair \(low \[\.\.\., r\], up \[V, r\]\) or None, got Tensor"),
        ((torch.ones(4, 2),), TypeError, "must be a pair .* got tuple of 1"),
        ((torch.ones(4, 2), None), TypeError, "adapter's up must be a torch.Tensor, got NoneType"),
        ((torch.ones(4, 2), torch.ones(9, 2)), ValueError, r"up must be \[V=11, r\] with r >= 1, got \[9, 2\]"),
        ((torch.ones(4, 2), torch.ones(11, 3)), ValueError, r"low must be .* = \[4, 3\], got \[4, 2\]"),
        ((torch.ones(4, 0), torch.ones(11, 0)), ValueError, r"r >= 1"),
        ((torch.ones(4, 2).long(), torch.ones(11, 2)), ValueError, "adapter's low must be float32"),
    ],
    ids=["one tensor", "one of two", "half", "V", "rank", "no rank", "integers"],
)
def test_a_wrong_adapter_is_named(adapter, error, words):
    hidden, weight, target = torch.ones(4, 5), torch.ones(11, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=words):
        linear_token_logp(hidden, weight, target, adapter=adapter)
    options = {"seq_weight": torch.ones(1), "group": torch.zeros(1, dtype=torch.int64), "beta": 0.1}
    lead = adapter if not isinstance(adapter, tuple) else (adapter[0][None], *adapter[1:])
    with pytest.raises(error, match=words.replace(r"\[4, ", r"\[1, 4, ")):
        linear_preference_loss(hidden[None], weight, target[None], adapter=lead, **options)
