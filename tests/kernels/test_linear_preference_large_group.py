"""A group beyond the budget: no row is computed twice but where the loss says so, and the gradients are the same."""

from __future__ import annotations

import math

import pytest
import torch
from cost import budget_of, product_flops
from torch import Tensor
from uneven_batch import HEADS, Batch

from wrpo_kernels import linear_preference_loss
from wrpo_kernels.linear_preference_loss import one_pass
from wrpo_kernels.linear_preference_loss.passes import Facts, plan_passes, room_of

HEAD = HEADS["small head"]
R = 3
COUNTED = 8  # rows of a sequence
GROUP = 2 * COUNTED  # of a pair


@pytest.fixture
def adding_is_free(monkeypatch):
    """However few its rows beyond the budget, a group is never computed twice for the sake of a second dW."""
    monkeypatch.setattr(one_pass, "rows_of_a_total", lambda device: 0)


def products(head: tuple[int, int], rows: int, backend: str, device: torch.device, pairs: int = 4, **options) -> float:
    """Flops of a training step of `pairs` pairs, in products of the rows that count."""
    vocabulary, width = head
    hidden = torch.randn(2 * pairs, COUNTED + 3, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, requires_grad=True)
    labels = torch.randint(0, vocabulary, (2 * pairs, COUNTED + 3), device=device)
    labels[:, :3] = -100
    given = {
        "seq_weight": torch.tensor([1.0, -1.0], device=device).repeat(pairs),
        "group": torch.arange(pairs, device=device).repeat_interleave(2),
        "num_groups": pairs,
        "budget_bytes": budget_of(rows, *head, torch.float32),
    }
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}

    def step():
        out = linear_preference_loss(hidden, weight, labels, beta=0.1, backend=backend, **given | options)
        out.loss.backward()

    return product_flops(step) / (2 * 2 * pairs * COUNTED * vocabulary * width)


LOSSES = {
    "sigmoid": {},
    "smoothing": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "by length": {"length_normalize": True, "gamma": 0.5},
    "nll weight of zero": {"nll_weight": 0.0},
    "likelihood alone": {"seq_weight": torch.zeros(8), "nll_weight": 1.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_trained_head_is_three_products_at_any_budget(name, backend, device, adding_is_free):
    for rows in (GROUP, GROUP - 1, 5):
        assert products(HEAD, rows, backend, device, **LOSSES[name]) == 3


def test_one_group_alone_is_three_products_without_a_second_total(backend, device):
    for rows in (GROUP, GROUP // 2, 1):
        assert products(HEAD, rows, backend, device, pairs=1) == 3


def of_a_pair(rows: int, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Loss and gradients of one pair on the CPU, with a budget for `rows` of its rows."""
    vocabulary, width = HEAD
    hidden = options.pop("hidden", torch.randn(2, COUNTED, width)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, COUNTED))
    options |= {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.zeros(2, dtype=torch.int64), "beta": 0.1}
    loss = linear_preference_loss(hidden, weight, labels, budget_bytes=budget_of(rows, *HEAD, dtype), **options).loss
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss.detach(), "hidden": dh, "weight": dw}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [GROUP - 1, 3])
def test_a_group_in_pieces_leaves_a_cpu_nothing_to_multiply(rows, dtype, monkeypatch):
    """A 16-bit head multiplies its float32 dW where it rounds it."""
    left = []

    def recorded(*arguments, run=one_pass.run, **options):
        result, factor = run(*arguments, **options)
        left.append(factor)
        return result, factor

    monkeypatch.setattr(one_pass, "run", recorded)
    of_a_pair(rows, dtype)
    assert [factor is None for factor in left] == [dtype == torch.float32]


@pytest.mark.parametrize("rows", [GROUP - 1, 3])
def test_a_slope_of_zero_or_nan_reaches_all_pieces(rows):
    satisfied = of_a_pair(rows, torch.float32, loss_type="hinge", ref_logp=torch.tensor([-1e4, 1e4]))
    assert all((satisfied[name] == 0).all() for name in ("loss", "hidden", "weight"))
    for broken in (0, 2 * COUNTED - 1):  # a row of the first piece, and of the last
        hidden = torch.randn(2 * COUNTED, HEAD[1])
        hidden[broken, 0] = torch.nan
        found = of_a_pair(rows, torch.float32, hidden=hidden.view(2, COUNTED, -1))
        assert all(value.isnan().all() for value in found.values())


def test_with_a_likelihood_term_the_rows_beyond_the_budget_are_computed_once_more(backend, device):
    for rows in (GROUP, GROUP - 1, 4):
        assert products(HEAD, rows, backend, device, nll_weight=0.1) == pytest.approx(4 - rows / GROUP)


def test_a_few_rows_of_a_second_group_are_computed_again_rather_than_a_second_total_added(backend, device):
    beyond = 3 * (GROUP - 9)  # of three of the four groups
    assert products(HEAD, 9, backend, device) == pytest.approx(3 + beyond / (4 * GROUP))


def test_groups_are_walked_as_their_loss_and_size_ask():
    facts = Facts(
        length=[40, 40, 3, 3, 60, 60, 70, 70, 4, 4, 50, 51, 30, 25],
        group=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6],
        has_weight=[1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1],
        has_nll=[0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0],
    )
    plan = plan_passes(facts, 8, together=50, fit=50, extra_rows=10)
    assert [(some.walk, some.sequences) for some in plan] == [
        ("scaled", [0, 1]),
        ("scaled", [10, 11]),
        ("whole", [2, 3]),
        ("twice", [4, 5]),  # it has both terms
        ("known", [6, 7]),  # it has no margin
        ("whole", [8, 9]),
        ("twice", [12, 13]),  # 5 rows beyond the budget
    ]
    plan = plan_passes(facts, 8, together=50, fit=130, extra_rows=10)
    assert [(some.walk, some.sequences) for some in plan] == [
        ("scaled", [0, 1]),  # in pieces, though the budget holds it
        ("whole", [2, 3]),
        ("whole", [4, 5]),
        ("known", [6, 7]),
        ("whole", [8, 9]),
        ("whole", [10, 11]),  # the totals are taken
        ("whole", [12, 13]),
    ]
    assert [room_of(some, facts, 50, 130) for some in plan] == [50, 6, 120, 50, 8, 101, 55]


FAMILY = LOSSES | {
    "reference free": {"ref_logp": None},
    "nll of some": {"nll_weight": torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.3, 0.0, 2.0])},
    "weighted groups": {"group_weight": torch.tensor([2.0, 0.0, 0.3])},
    "no margin in a group": {"seq_weight": torch.tensor([0.0, 1.0, 1.0, -1.0, 0.0, 0.0, -1.0, 0.0]), "nll_weight": 0.3},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 7},
    "filter": {"grad_filter": 1e-30},
}
NAMES = ("hidden", "weight", "bias", "low", "up")


def gradients(batch: Batch, rows: int | None, wanted: tuple[str, ...], backend: str, **options) -> dict[str, Tensor]:
    torch.manual_seed(5)
    vocabulary, width = batch.head
    tensors = batch.tensors() | {
        "low": torch.randn(*batch.labels.shape, R, dtype=batch.dtype).to(batch.hidden.device),
        "up": torch.randn(vocabulary, R, dtype=batch.dtype).to(batch.hidden.device),
    }
    leaves = {name: tensors[name].detach().requires_grad_(name in wanted) for name in NAMES}
    given = batch.options | {"beta": 0.1, "ref_logp": batch.ref_logp} | options
    budget = None if rows is None else budget_of(rows, vocabulary, width + R, batch.dtype)
    out = linear_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        batch.labels,
        bias=leaves["bias"],
        adapter=(leaves["low"], leaves["up"]),
        budget_bytes=budget,
        backend=backend,
        **given,
    )
    found = torch.autograd.grad(out.loss, [leaves[name] for name in wanted], 1.7 * torch.ones_like(out.loss))
    return {"loss": out.loss.detach(), "margin": out.margin, **dict(zip(wanted, found, strict=True))}


def assert_same(batch: Batch, rows: int, wanted: tuple[str, ...], **options) -> None:
    whole = gradients(batch, None, wanted, "reference", **options)
    for name, value in gradients(batch, rows, wanted, "reference", **options).items():
        error = (value - whole[name]).abs().max() / whole[name].abs().max().clamp(min=1e-300)
        assert error < 1e-12, f"{name} is off by {float(error):.1e} of its largest value"


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_has_the_gradients_of_one_chunk_in_float64(name, adding_is_free):
    for rows in (13, 9, 1):
        assert_same(Batch(HEAD, torch.float64, torch.device("cpu")), rows, NAMES, **FAMILY[name])


@pytest.mark.parametrize("wanted", [("weight",), ("hidden", "up"), ("bias",), ("hidden", "low"), ("up",)])
def test_whichever_gradients_are_asked_for(wanted, adding_is_free):
    assert_same(Batch(HEAD, torch.float64, torch.device("cpu")), 9, wanted)


ONE_GROUP = {"group": torch.zeros(8, dtype=torch.int64), "num_groups": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("groups", [{}, ONE_GROUP], ids=["three groups", "one group"])
def test_a_hidden_state_that_is_no_number_reaches_the_rows_of_its_own_group_alone(groups, value, backend, device):
    for rows in (None, 20, 9, 1):
        batch = Batch(HEAD, torch.float32, device)
        batch.hidden[1, 2, 3] = value  # its label counts
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in groups.items()}
        grads = gradients(batch, rows, ("hidden", "low"), backend, **options)
        group = (batch.options | options)["group"]
        reached = batch.counts & (group == group[1])[:, None]
        assert grads["loss"].isnan()
        for name in ("hidden", "low"):
            assert torch.equal(grads[name].isnan().any(-1), reached), f"{name}, {rows} rows"
            assert (grads[name][~batch.counts] == 0).all()


@pytest.mark.parametrize("rows", [None, 9])
def test_a_loss_that_is_nan_has_no_gradient_that_is_a_number(rows, backend, device):
    """Where the margin is won and no coefficient is left, too."""
    batch = Batch(HEAD, torch.float32, device)
    leaves = {name: x.requires_grad_() for name, x in batch.tensors(bias=False).items()}
    options = {**batch.options, "gamma": -1e6, "loss_type": "hinge", "backend": backend}
    budget = None if rows is None else batch.budget(rows)
    loss = linear_preference_loss(labels=batch.labels, beta=0.1, budget_bytes=budget, **leaves, **options).loss
    assert loss == 0
    grads = torch.autograd.grad(loss, [leaves["hidden"], leaves["weight"]], loss.new_full((), math.nan))
    assert grads[0][batch.counts].isnan().all() and grads[1].isnan().all()


@pytest.mark.parametrize("size", [1e-38, 1e30, 3e38])
@pytest.mark.parametrize("groups", [{}, ONE_GROUP], ids=["three groups", "one group"])
def test_sequences_of_any_weight_have_the_gradients_of_one_chunk(groups, size, backend, adding_is_free):
    """In float32, where a product of the hidden states with such a weight has long overflowed."""
    batch = Batch(HEAD, torch.float32, torch.device("cpu"))
    options = {"seq_weight": batch.options["seq_weight"] * size, "beta": 1e-2 / size, **groups}
    whole = gradients(batch, None, NAMES, backend, **options)
    for rows in (9, 1):
        for name, value in gradients(batch, rows, NAMES, backend, **options).items():
            assert value.isfinite().all() and whole[name].abs().max() > 0
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5 * float(whole[name].abs().max()))
