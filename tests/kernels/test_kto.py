"""`kto_loss` and `linear_kto_loss`: the paper's formula in float64, and what they refuse."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from wrpo_kernels import kto_loss, linear_kto_loss, linear_token_logp

GOOD = torch.tensor([True, False, False, True, False])


def papers_loss(logp, ref_logp, kl, beta=0.1, good=1.0, bad=1.0):
    reward = beta * (logp.double() - ref_logp.double())
    desirable = good * (1 - torch.sigmoid(reward - beta * kl))
    return torch.where(GOOD.to(logp.device), desirable, bad * (1 - torch.sigmoid(beta * kl - reward)))


@pytest.mark.parametrize("kl", [0.0, 3.5, torch.tensor(1.25)])
def test_the_loss_is_the_papers_formula(kl, backend, device):
    logp = (-100 * torch.rand(5)).to(device)
    ref_logp = logp + 10 * torch.randn(5, device=device)
    kl = kl.to(device) if isinstance(kl, torch.Tensor) else kl
    exact, x = logp.double().requires_grad_(), logp.clone().requires_grad_()
    truth = papers_loss(exact, ref_logp, kl, good=1.33, bad=0.75)
    options = {"is_desirable": GOOD.to(device), "kl": kl, "desirable_weight": 1.33, "undesirable_weight": 0.75}
    out = kto_loss(x, ref_logp, **options, reduction="none", backend=backend)
    c = torch.tensor([1.5, -0.3, 0.7, 1.1, 0.2], device=device)
    (true,) = torch.autograd.grad(truth, exact, c.double())
    (grad,) = torch.autograd.grad(out.loss, x, c)
    for name, got, expected in (("loss", out.loss, truth.detach()), ("gradient", grad, true)):
        oracle.assert_rule(name, got, expected, expected, 1e-6 * expected.abs())
    mean = kto_loss(logp, ref_logp, **options, backend=backend).loss
    torch.testing.assert_close(mean.double(), truth.mean().detach())


def test_from_hidden_states_it_is_the_loss_of_their_log_probs():
    hidden, weight = torch.randn(5, 7, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    labels, ref_logp = torch.randint(0, 30, (5, 7)), -20 * torch.rand(5)
    logp = linear_token_logp(hidden, weight, labels).sum(1)
    for budget in (None, 200):
        options = {"is_desirable": GOOD, "kl": 0.5}
        out = linear_kto_loss(hidden, weight, labels, ref_logp, **options, budget_bytes=budget)
        true = kto_loss(logp, ref_logp, **options)
        torch.testing.assert_close(out.loss, true.loss)
        got, expected = (torch.autograd.grad(x.loss, (hidden, weight), retain_graph=True) for x in (out, true))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_desirable": GOOD[:3]}, r"is_desirable.*\[5\].*\[3\]"),
        ({"is_desirable": GOOD.float()}, "is_desirable.*bool.*float32"),
        ({"kl": -1.0}, "kl.*>= 0"),
        ({"kl": torch.tensor(math.nan)}, "kl.*finite"),
        ({"desirable_weight": -0.5}, "desirable_weight.*>= 0"),
        ({"logp": torch.zeros(())}, r"^logp must be \[S\], got \[\]"),
    ],
)
def test_a_wrong_argument_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        kto_loss(**{"logp": torch.zeros(5), "is_desirable": GOOD, **changes})
