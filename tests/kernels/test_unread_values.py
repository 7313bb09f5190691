"""What eager code on the CPU refuses is an error or NaN, never a number, where nobody can look at the values first: in
compiled code, and on an accelerator, which would have to be waited for."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import HERE, PLAYED
from torch import Tensor

from wrpo_kernels import checks, linear_preference_loss, linear_token_logp, preference_loss, wrpo_loss
from wrpo_kernels.linear_preference_loss.contract import are_bounds

PLACES = (*HERE, PLAYED)
S, T, D, V = 6, 4, 8, 23
PAIRS = {
    "seq_weight": torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]),
    "group": torch.tensor([0, 1, 2, 0, 1, 2]),
    "num_groups": 3,
    "beta": 0.1,
}
LENGTH = torch.tensor([3, 4, 1, 2, 5, 3])


def with_one(values: Tensor, at: int, value: float) -> Tensor:
    changed = values.clone()
    changed[at] = value
    return changed


# What is wrong, and in which groups.
WRONG = {
    "an empty response": ({"length": with_one(LENGTH, 1, 0)}, [1]),
    "a negative length": ({"length": with_one(LENGTH, 4, -2)}, [1]),
    "a negative length to divide by": ({"length": with_one(LENGTH, 4, -2), "length_normalize": True}, [1]),
    "a negative length beside empty ones": ({"length": with_one(LENGTH, 4, -2), "empty": "zero"}, [1]),
    "a group beyond G": ({"group": torch.tensor([0, 1, 2, 0, 1, 3])}, [0, 1, 2]),
    "a group beyond G beside empty ones": (
        {"group": torch.tensor([0, 1, 2, 0, 1, 3]), "length": LENGTH, "empty": "zero", "nll_weight": 0.1},
        [0, 1, 2],
    ),
    "a negative group": ({"group": torch.tensor([0, 1, 2, 0, 1, -1])}, [0, 1, 2]),
    "a group without sequences": ({"group": torch.tensor([0, 1, 0, 0, 1, 1])}, [2]),
}
NORMALIZERS = {"zero": 0.0, "negative": -3.0, "infinite": math.inf, "no number": math.nan}
ALPHAS = {
    "above 1": torch.tensor(1.7),
    "below 0": torch.tensor(-0.1),
    "no number": torch.tensor(math.nan),
    "of one example above 1": torch.tensor([0.3, 1.2]),
    "of one example more than 1 together": torch.tensor([[0.7, 0.2], [0.7, 0.4]]),
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """As if the tensors were on an accelerator: the doors look at no value, and an op's kernel neither."""
    if backend == "native":
        pytest.skip("runs on the CPU alone, where an op looks at the values")
    monkeypatch.setattr(checks, "is_compiling", lambda: True)


def losses_and_gradient(options: dict, device: torch.device, backend: str) -> tuple[Tensor, Tensor]:
    """[G] and [S] of six sequences."""
    given = {**PAIRS, **options, "backend": backend, "reduction": "none"}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    logp = (-10 * torch.rand(S, device=device)).requires_grad_()
    out = preference_loss(logp, **given)
    return out.loss.detach(), torch.autograd.grad(out.loss.sum(), logp)[0]


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_nan_in_its_own_groups_and_their_gradients(name, unread, backend, device):
    options, groups = WRONG[name]
    loss, grad = losses_and_gradient(options, device, backend)
    is_wrong = torch.zeros(3, dtype=torch.bool).index_fill_(0, torch.tensor(groups), True)
    assert torch.equal(loss.isnan().cpu(), is_wrong)
    group = {**PAIRS, **options}["group"]
    of_group = is_wrong[group.clamp(0, 2)] | (group < 0) | (group > 2)
    if options.get("length_normalize"):
        of_group &= options["length"] > 0  # what is divided by no length has no share in its group
    assert torch.equal(grad.isnan().cpu(), of_group)


@pytest.mark.parametrize("name", WRONG)
def test_eager_code_on_the_cpu_names_it(name):
    with pytest.raises(ValueError, match=r"length|group|sequence"):
        losses_and_gradient(WRONG[name][0], torch.device("cpu"), "reference")


@pytest.mark.parametrize("name", WRONG)
def test_compiled_code_returns_no_number(name):
    """An error where an op meets the values, else NaN."""
    torch._dynamo.reset()
    options, _ = WRONG[name]
    others = {key: value for key, value in options.items() if not isinstance(value, Tensor)}
    tensors = {key: value for key, value in {**PAIRS, **options}.items() if isinstance(value, Tensor)}

    def loss(logp: Tensor, tensors: dict) -> Tensor:
        return preference_loss(logp, **{**PAIRS, **others, **tensors}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logp = torch.zeros(S, requires_grad=True)
    if "group" in name and "length" not in name:
        with pytest.raises(ValueError, match="group must"):
            compiled(logp, tensors)
    else:
        value = compiled(logp, tensors)
        assert value.isnan()
        assert torch.autograd.grad(value, logp)[0].isnan().any()


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_normalizer_that_cannot_be_read_makes_nan_of_the_loss(name, kind, monkeypatch):
    def loss(logp: Tensor, normalizer: Tensor) -> Tensor:
        return preference_loss(logp, **PAIRS, normalizer=normalizer).loss

    function = _unread(loss, kind, monkeypatch)
    logp = torch.zeros(S, requires_grad=True)
    assert function(logp, torch.tensor(3.0)).isfinite()
    value = function(logp, torch.tensor(NORMALIZERS[name]))
    assert value.isnan() and torch.autograd.grad(value, logp)[0].isnan().all()


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("name", ALPHAS)
def test_an_alpha_that_cannot_be_read_makes_nan_of_its_examples(name, kind, monkeypatch):
    alpha = ALPHAS[name]
    sources = 2 if alpha.dim() == 2 else 1

    def losses(logp: Tensor, alpha: Tensor) -> Tensor:
        return wrpo_loss(logp, alpha=alpha, num_sources=sources, reduction="none").loss

    function = _unread(losses, kind, monkeypatch)
    logp = torch.zeros(2 * (sources + 2))
    is_wrong = [False, True] if alpha.dim() else [True, True]
    assert function(logp, alpha).isnan().tolist() == is_wrong
    assert function(logp, alpha.nan_to_num().clamp(0, 0.5)).isfinite().all()


def _unread(function, kind: str, monkeypatch: pytest.MonkeyPatch):
    if kind == "compiled":
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(checks, "is_compiling", lambda: True)
    return function


def linear_problem() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, V, (S, T))
    labels[:, 0] = -100
    return torch.randn(S, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True), labels


@pytest.mark.parametrize("trains", ["head", "hidden states"])
def test_compiled_code_refuses_a_wrong_number_of_rows(trains):
    torch._dynamo.reset()
    hidden, weight, labels = linear_problem()
    if trains == "hidden states":
        weight = weight.detach()
    compiled = torch.compile(
        lambda h, w, y, n: linear_token_logp(h, w, y, num_rows=n).sum(), fullgraph=True, backend="aot_eager"
    )
    expected = linear_token_logp(hidden, weight, labels).sum()
    torch.testing.assert_close(compiled(hidden, weight, labels, 18), expected)
    for num_rows in (17, 19):
        with pytest.raises(ValueError, match=f"num_rows.*18, got {num_rows}"):
            compiled(hidden, weight, labels, num_rows)
    # Every label is taken, and those to ignore are met by the row kernel.
    assert compiled(hidden, weight, labels, labels.numel()).isnan()


BOUNDS = {
    "right": ([0, 4, 8, 12, 16, 20, 24], True),
    "right, with an empty one": ([0, 4, 4, 12, 16, 20, 24], True),
    "beyond the rows": ([0, 4, 8, 12, 16, 20, 25], False),
    "not from 0": ([1, 4, 8, 12, 16, 20, 24], False),
    "falling": ([0, 4, 3, 12, 16, 20, 24], False),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_judged_without_being_read(name):
    bounds, is_right = BOUNDS[name]
    assert bool(are_bounds(torch.tensor(bounds), 24)) == is_right


@pytest.mark.gpu
@pytest.mark.parametrize("name", BOUNDS)
def test_wrong_bounds_on_an_accelerator_make_nan_of_the_loss(name):
    bounds, is_right = BOUNDS[name]
    hidden, weight, labels = (x.detach().cuda() for x in linear_problem())
    pairs = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in PAIRS.items()}
    bounds = torch.tensor(bounds, device="cuda")
    flat = hidden.flatten(0, 1).requires_grad_()
    out = linear_preference_loss(flat, weight, labels.flatten(), **pairs, cu_seqlens=bounds, empty="zero")
    assert bool(out.loss.isfinite()) == is_right
