"""An eager call goes past torch's dispatcher; where it must not, or cannot know whether it may, it does not."""

from __future__ import annotations

import oracle
import pytest
import torch
from doors import LARGE, OF_OPS, doors, value_and_gradients
from torch.autograd import forward_ad

from wrpo_kernels import preference_loss
from wrpo_kernels.dispatch import autograd

CPU = torch.device("cpu")
PRIVATE_NAMES = ("number_of_modes", "has_transforms", "keeps_graph", "saving_hooks")
PAIRS = {
    "seq_weight": torch.tensor([1.0, 1.0, -1.0, -1.0]),
    "group": torch.tensor([0, 1, 0, 1]),
    "num_groups": 2,
    "beta": 0.1,
}
# A small head makes its gradients with the loss, a larger one keeps deltas.
sizes = pytest.mark.parametrize("size", [{}, {"vocabulary": LARGE, "width": 260}], ids=["small head", "larger head"])


def test_this_torch_has_every_private_name():
    """Otherwise the tests below compare the way around with itself."""
    assert all(getattr(autograd, name) is not None for name in PRIVATE_NAMES)


@sizes
@pytest.mark.parametrize("hidden", PRIVATE_NAMES)
@pytest.mark.parametrize("door", OF_OPS)
def test_without_a_private_name_of_torch_every_door_gives_the_same_bits(door, hidden, size, monkeypatch):
    function, given = doors(CPU, "native", **size)[door]
    expected = value_and_gradients(function, given)
    with torch.no_grad():
        alone = function(*given)
    monkeypatch.setattr(autograd, hidden, None)
    for got, wanted in zip(value_and_gradients(function, given), expected, strict=True):
        oracle.assert_same_bits(door, got, wanted)
    with torch.no_grad():
        oracle.assert_same_bits(door, function(*given), alone)


COMPILED = ("linear_token_logp", "linear_preference_loss", "linear_wrpo_loss", "linear_token_logp")


@pytest.mark.parametrize(("hidden", "door"), [*zip(PRIVATE_NAMES, COMPILED, strict=True)])
def test_without_a_private_name_of_torch_a_compiled_door_gives_the_same_bits(door, hidden, monkeypatch):
    function, given = doors(CPU, "native")[door]
    expected = value_and_gradients(function, given)
    monkeypatch.setattr(autograd, hidden, None)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(value_and_gradients(compiled, given), expected, strict=True):
        oracle.assert_same_bits(door, got, wanted)


@pytest.mark.parametrize("hidden", [None, *PRIVATE_NAMES])
def test_a_kept_graph_is_walked_twice_whatever_torch_tells(hidden, monkeypatch):
    if hidden:
        monkeypatch.setattr(autograd, hidden, None)
    function, given = doors(CPU, "native")["linear_preference_loss"]
    leaves, loss = [x for x in given if x.requires_grad], -0.75 * function(*given)
    first = [grad.clone() for grad in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for again, grad in zip(torch.autograd.grad(loss, leaves), first, strict=True):
        oracle.assert_same_bits("grad", again, grad)


@pytest.mark.parametrize("factor", [1.0, -0.75])
@pytest.mark.parametrize("door", OF_OPS)
def test_what_hooks_keep_of_a_forward_is_not_changed_by_the_backward(door, factor):
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append((x, x.clone()))
        return x

    function, given = doors(CPU, "native")[door]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = factor * function(*given).sum()
    torch.autograd.grad(value, [x for x in given if x.requires_grad])
    assert kept
    for x, before in kept:
        assert torch.equal(x, before)


def test_a_lazy_negative_is_read_as_what_it_stands_for():
    """`imag` of a conjugate is such a view: its memory holds the values with the other sign."""
    logp = torch.complex(torch.zeros(4), torch.tensor([5.0, 6.0, 7.0, 9.0])).conj().imag
    assert logp.is_neg()
    out = preference_loss(logp, **PAIRS)
    assert torch.equal(out.loss, preference_loss(logp.resolve_neg().clone(), **PAIRS).loss)


@pytest.mark.parametrize("door", OF_OPS)
def test_meta_tensors_give_the_shapes(door):
    (function, given), (on_cpu, values) = (doors(torch.device(kind), "reference")[door] for kind in ("meta", "cpu"))
    value, expected = function(*given), on_cpu(*values)
    assert value.is_meta and (value.shape, value.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("hidden", [None, "number_of_modes"])
@pytest.mark.parametrize("enabled", [True, False], ids=["with gradients", "without"])
def test_a_tangent_is_refused_not_left_out(enabled, hidden, monkeypatch):
    if hidden:
        monkeypatch.setattr(autograd, hidden, None)
    with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        logp = forward_ad.make_dual(torch.randn(4), torch.ones(4))
        with pytest.raises(NotImplementedError, match="wrpo::preference_loss has no forward-mode derivative"):
            preference_loss(logp, **PAIRS)


def test_a_transform_of_torch_sees_the_op():
    logp = torch.randn(3, 4)
    losses = torch.func.vmap(lambda x: preference_loss(x, **PAIRS).loss)(logp)
    assert torch.equal(losses, torch.stack([preference_loss(x, **PAIRS).loss for x in logp]))


def test_a_graph_names_the_op():
    logp = torch.randn(4, requires_grad=True)
    assert "wrpo_preference_loss" in preference_loss(logp, **PAIRS, reduction="none").loss.grad_fn.name()
