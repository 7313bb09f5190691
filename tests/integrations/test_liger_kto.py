"""Liger's KTO by our op: what liger_kernel's own class returns, and what its formula says without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from wrpo_kernels.integrations.liger import LigerFusedLinearKTOLoss

S, T, D, V = 5, 6, 8, 29
IS_CHOSEN = torch.tensor([True, False, True, True, False])
CASES: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "without a reference": ({}, None),
    "with a reference": ({"use_ref_model": True, "beta": 0.5}, torch.tensor([0.7])),
    "mean log-probs": ({"use_ref_model": True, "average_log_prob": True, "beta": 2.0}, torch.tensor(0.3)),
    "a reference point below 0": ({"use_ref_model": True, "ignore_index": 3}, torch.tensor([-1.5])),
}


def problem(ignore_index: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What is trained (input, weight, bias), and the other arguments of forward."""
    torch.manual_seed(5)
    target = torch.randint(4, V, (S, T))
    target[:, 0], target[1, 3:] = ignore_index, ignore_index
    trained = [x.requires_grad_() for x in (torch.randn(S, T, D), torch.randn(V, D), torch.randn(V))]
    rest = {"ref_input": torch.randn(S, T, D), "ref_weight": torch.randn(V, D), "ref_bias": torch.randn(V)}
    return trained, {"target": target, "preference_labels": IS_CHOSEN, **rest}


def run(kind: type, name: str) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """loss, what is logged, and the gradients of three times the loss."""
    options, kl = CASES[name]
    (hidden, weight, bias), rest = problem(options.get("ignore_index", -100))
    rest = rest if options.get("use_ref_model") else {x: rest[x] for x in ("target", "preference_labels")}
    loss, logged = kind(**options)(hidden, weight, bias=bias, kl=kl, **rest)
    return loss.detach(), tuple(logged), torch.autograd.grad(3 * loss, [hidden, weight, bias])


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_its_formula_with_all_that_it_logs(name):
    options, kl = CASES[name]
    (hidden, weight, bias), rest = problem(options.get("ignore_index", -100))
    counts = rest["target"] != options.get("ignore_index", -100)
    beta, average = options.get("beta", 0.1), options.get("average_log_prob", False)

    def logp(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        scores = h.double() @ w.double().T + b.double()
        label = scores.log_softmax(-1).gather(-1, rest["target"].clamp(min=0)[..., None])[..., 0]
        return (label * counts).sum(1) / (counts.sum(1) if average else 1), scores.sum((1, 2))

    own, logits = logp(hidden, weight, bias)
    ref = logp(rest["ref_input"], rest["ref_weight"], rest["ref_bias"])[0] if options.get("use_ref_model") else 0.0
    reward, sign = beta * (own - ref), torch.where(IS_CHOSEN, 1.0, -1.0)
    expected = (1 - torch.sigmoid(sign * (reward - beta * (0.0 if kl is None else kl.double())))).mean()
    sums = [x[kind].sum().detach() for x in (own, logits, reward) for kind in (IS_CHOSEN, ~IS_CHOSEN)]
    loss, logged, grads = run(LigerFusedLinearKTOLoss, name)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close([x.double() for x in logged], sums, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        list(grads), list(torch.autograd.grad(3 * expected, [hidden, weight, bias])), rtol=1e-4, atol=1e-6
    )
    assert not any(x.requires_grad for x in logged)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_ligers_own(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason="liger_kernel is not installed")

    def uncompiled(**options: Any) -> Any:
        return theirs.LigerFusedLinearKTOLoss(**options, compiled=False)

    torch.testing.assert_close(run(LigerFusedLinearKTOLoss, name), run(uncompiled, name), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preference_labels": None}, r"preference_labels must be given: \[S\] bool"),
        ({"preference_labels": IS_CHOSEN.long()}, "preference_labels must be bool, True where chosen, got torch.int64"),
        ({"preference_labels": IS_CHOSEN[:2]}, r"preference_labels must be \[S\] = \[5\], got \[2\]"),
        ({"kl": torch.zeros(S)}, r"kl must be one number for the batch, \[\] or \[1\], got \[5\]"),
        ({"kl": torch.tensor(float("nan"))}, "kl must be a finite number, got nan"),
        ({"kl": torch.tensor(True)}, "kl must be a float tensor or a number, got torch.bool"),
        (
            {"target": torch.full((S, T), -100)},
            r"target\[0\] has no label that counts, so its log-prob means nothing; leave the sequence out",
        ),
        ({"ref_weight": None}, "ref_input and ref_weight must be given with use_ref_model=True"),
    ],
)
def test_a_wrong_argument_is_named(wrong, message):
    (hidden, weight, bias), rest = problem(-100)
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearKTOLoss(use_ref_model=True)(hidden, weight, bias=bias, **{**rest, **wrong})
