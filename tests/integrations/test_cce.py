"""cut-cross-entropy's function and module by our op."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from wrpo_kernels.integrations import cce

B, T, D, V = 3, 5, 8, 29


def problem(dtype: torch.dtype = torch.float32):
    targets = torch.randint(0, V, (B, T))
    targets[0, 2:], targets[1, 0] = -100, -100
    e, c, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((B, T, D), (V, D), (V,)))
    return e, c, bias, targets


def plain(e, c, bias, targets, softcap, reduction, shift):
    """As its documentation says: with a shift the first targets are predicted by nothing."""
    scores = e.float() @ c.float().T + (0 if bias is None else bias.float())
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if shift:
        scores, targets = scores[:, :-shift], targets[:, shift:]
    return F.cross_entropy(scores.transpose(1, 2), targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True, 2])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_shapes_and_gradients_are_those_of_plain_torch(reduction, shift, softcap, has_bias):
    e, c, bias, targets = problem()
    bias = bias if has_bias else None
    got = cce.linear_cross_entropy(e, c, targets, bias=bias, softcap=softcap, reduction=reduction, shift=shift)
    expected = plain(e, c, bias, targets, softcap, reduction, shift)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream, leaves = torch.rand_like(got), [e, c] + [bias] * has_bias
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_library_itself_returns_the_same(reduction, shift):
    theirs = pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    e, c, _, targets = problem()
    options = {"softcap": 4.0, "reduction": reduction, "shift": shift}
    with torch.compiler.set_stance("force_eager"):  # its plain implementation is a compiled function
        expected = theirs.linear_cross_entropy(e, c, targets, impl="torch_compile", **options)
    torch.testing.assert_close(cce.linear_cross_entropy(e, c, targets, **options), expected, rtol=1e-5, atol=1e-5)
    module = cce.LinearCrossEntropy(**options)
    torch.testing.assert_close(module(e, c, targets), expected, rtol=1e-5, atol=1e-5)
    own, other = (inspect.signature(f).parameters for f in (cce.linear_cross_entropy, theirs.linear_cross_entropy))
    assert {*other} <= {*own}


def test_under_autocast_it_multiplies_as_a_linear_layer_does():
    e, c, _, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        got = cce.linear_cross_entropy(e, c, targets)
    assert torch.equal(got, cce.linear_cross_entropy(e.bfloat16(), c, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_log_sum_exp_comes_beside_the_loss_with_its_gradient(reduction, shift):
    e, c, bias, targets = problem()
    options = {"bias": bias, "softcap": 4.0, "reduction": reduction, "shift": shift}
    loss, lse = cce.linear_cross_entropy(e, c, targets, return_lse=True, **options)
    torch.testing.assert_close(loss, cce.linear_cross_entropy(e, c, targets, **options), rtol=1e-6, atol=1e-6)
    scores = 4.0 * torch.tanh((e @ c.T + bias) / 4.0)
    if shift:
        scores, targets = scores[:, :-1], targets[:, 1:]
    expected = scores.logsumexp(-1) * (targets != -100)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.square().sum(), [e, c, bias]) for x in (lse, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_had_is_refused():
    e, c, _, targets = problem()
    with pytest.raises(NotImplementedError, match="vocab_parallel_options"):
        cce.linear_cross_entropy(e, c, targets, vocab_parallel_options=True)
