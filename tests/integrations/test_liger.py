"""Liger's losses by our ops: what liger_kernel's own classes return, and what their formulas say without it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wrpo_kernels.integrations import liger
from wrpo_kernels.integrations.liger.sequences import mean_logits

B, T, D, V = 3, 6, 8, 29
CPU = "liger_kernel is not installed (pip install liger-kernel)"
UNSMOOTHED = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("LigerFusedLinearDPOLoss", {"beta": 0.5}),
    "DPO, hinge": ("LigerFusedLinearDPOLoss", {"beta": 0.5, "loss_type": "hinge"}),
    "DPO, with NLL": ("LigerFusedLinearDPOLoss", {"compute_nll_loss": True, "alpha": 0.7}),
    "DPO, mean log-probs with NLL": (
        "LigerFusedLinearDPOLoss",
        {"compute_nll_loss": True, "average_log_prob": True, "beta": 2.0},
    ),
    "DPO, without a reference": ("LigerFusedLinearDPOLoss", {"use_ref_model": False}),
    **{f"DPO, {kind}": ("LigerFusedLinearDPOLoss", {"loss_type": kind, "beta": 0.5}) for kind in UNSMOOTHED},
    **{
        f"DPO, {kind}": ("LigerFusedLinearDPOLoss", {"loss_type": kind, "label_smoothing": 0.1, "beta": 0.5})
        for kind in ("exo_pair", "robust")
    },
    "CPO": ("LigerFusedLinearCPOLoss", {"label_smoothing": 0.1, "alpha": 0.3}),
    "CPO, mean log-probs": ("LigerFusedLinearCPOLoss", {"average_log_prob": True, "beta": 2.0}),
    "SimPO": ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "gamma": 0.3, "label_smoothing": 0.1}),
    "SimPO, without NLL": ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "compute_nll_loss": False}),
    "ORPO": ("LigerFusedLinearORPOLoss", {"beta": 0.4}),
    "ORPO, without NLL": ("LigerFusedLinearORPOLoss", {"compute_nll_loss": False}),
    "ORPO, labels of its own": ("LigerFusedLinearORPOLoss", {}),
}


def problem(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What is trained (weight, input, bias), and the other arguments of forward."""
    torch.manual_seed(3)
    target = torch.randint(0, V, (2 * B, T))
    target[:, 0], target[1, 3:], target[4, 4:] = -100, -100, -100
    trained = [x.requires_grad_() for x in (torch.randn(V, D), torch.randn(2 * B, T, D), torch.randn(V))]
    rest = {"target": target}
    if name.startswith("DPO") and name != "DPO, without a reference":
        rest |= {"ref_input": torch.randn(2 * B, T, D), "ref_weight": torch.randn(V, D), "ref_bias": torch.randn(V)}
    if name == "ORPO, labels of its own":
        rest["nll_target"] = torch.randint(0, V, (2 * B, T))
    return trained, rest


def run(kind: type, options: dict[str, Any], name: str) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """loss, what is logged, and the gradients of three times the loss."""
    (weight, hidden, bias), rest = problem(name)
    loss, logged = kind(**options)(weight, hidden, rest.pop("target"), bias, **rest)
    return loss.detach(), tuple(logged), torch.autograd.grad(3 * loss, [weight, hidden, bias])


@pytest.mark.parametrize("name", LOSSES)
def test_a_preference_loss_is_ligers_with_all_that_it_logs(name):
    theirs = pytest.importorskip("liger_kernel.chunked_loss", reason=CPU)
    kind, options = LOSSES[name]
    got = run(getattr(liger, kind), options, name)
    expected = run(getattr(theirs, kind), {**options, "compiled": False}, name)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def truth(name: str, options: dict[str, Any]) -> Tensor:
    """The formulas, in float64, of the losses that have one each."""
    (weight, hidden, bias), rest = problem(name)
    target, beta = rest["target"], options.get("beta", 0.1)

    def mean_or_sum(h: Tensor, w: Tensor, b: Tensor, average: bool) -> Tensor:
        share = F.log_softmax((h @ w.T + b).detach().double(), -1)
        logp = share.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
        return logp.sum(1) / ((target != -100).sum(1) if average else 1)

    average = options.get("average_log_prob", name.startswith(("SimPO", "ORPO")))
    logp = mean_or_sum(hidden, weight, bias, average)
    tokens = (target[:B] != -100).sum()
    total = mean_or_sum(hidden, weight, bias, False)[:B].sum()
    nll = -total / tokens if options.get("compute_nll_loss", not name.startswith("DPO")) else 0.0
    if "ref_input" in rest:
        logp = logp - mean_or_sum(rest["ref_input"], rest["ref_weight"], rest["ref_bias"], average)
    chosen, rejected = logp.split(B)
    if name.startswith("ORPO"):
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        return nll - beta * F.logsigmoid(odds).mean()
    margin = beta * (chosen - rejected) - (options.get("gamma", 0.5) if name.startswith("SimPO") else 0.0)
    smoothing = options.get("label_smoothing", 0.0)
    loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    if options.get("loss_type") == "hinge":
        loss = torch.relu(1 - margin)
    return options.get("alpha", 1.0) * nll + loss.mean()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LOSSES
        if name != "ORPO, labels of its own" and LOSSES[name][1].get("loss_type") in (None, "hinge")
    ],
)
def test_a_preference_loss_is_its_formula(name):
    kind, options = LOSSES[name]
    loss, logged, _ = run(getattr(liger, kind), options, name)
    torch.testing.assert_close(loss.double(), truth(name, options), rtol=1e-5, atol=1e-6)
    assert not any(x.requires_grad for x in logged)


@pytest.mark.parametrize("kind", liger.__all__)
def test_the_signatures_are_ligers(kind):
    module = "liger_kernel.chunked_loss" if "CrossEntropy" not in kind else "liger_kernel.transformers"
    pytest.importorskip("liger_kernel", reason=CPU)
    theirs, ours = getattr(importlib.import_module(module), kind), getattr(liger, kind)
    for method in ("__init__", "forward"):
        own, other = (inspect.signature(getattr(x, method)).parameters for x in (ours, theirs))
        assert [(p.name, p.default) for p in own.values()] == [(p.name, p.default) for p in other.values()]


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none"},
    "softcap": {"softcap": 5.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"lse_square_scale": 0.01},
    "class weights": {"ce_weight": torch.linspace(0.1, 1.0, V)},
    **{
        f"class weights with all else, {reduction}": {
            "ce_weight": torch.linspace(0.1, 1.0, V),
            "lse_square_scale": 0.01,
            "label_smoothing": 0.1,
            "softcap": 5.0,
            "reduction": reduction,
        }
        for reduction in ("mean", "sum", "none")
    },
    "token scaling": {"use_token_scaling": True},
    "token scaling, each": {"use_token_scaling": True, "reduction": "none"},
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_the_cross_entropy_is_ligers_formula(name):
    options = CROSS_ENTROPIES[name]
    (weight, hidden, bias), rest = problem("")
    hidden, target = hidden.detach().flatten(0, 1).requires_grad_(), rest["target"].flatten()
    scores = hidden.double() @ weight.double().T + bias.double()
    cap = options.get("softcap")
    scores = cap * torch.tanh(scores / cap) if cap else scores
    class_weight = options.get("ce_weight")
    reduction = options.get("reduction", "mean")
    counts = (target != -100).double()
    expected = F.cross_entropy(
        scores,
        target,
        None if class_weight is None else class_weight.double(),
        reduction="none",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    z_loss = options.get("lse_square_scale", 0.0) * scores.logsumexp(-1) ** 2 * counts
    if options.get("use_token_scaling"):
        expected = expected * torch.exp(-expected.detach())
    share = counts if class_weight is None else class_weight.double()[target.clamp(min=0)] * counts
    means = expected.sum() / share.sum() + z_loss.sum() / counts.sum()
    expected = {"none": expected + z_loss, "sum": (expected + z_loss).sum(), "mean": means}[reduction]
    got = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, target, bias)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    c = torch.rand_like(got)
    grads = [torch.autograd.grad(y, [weight, hidden, bias], c.to(y.dtype)) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_cross_entropy_returns_what_liger_returns_beside_it(reduction):
    (weight, hidden, bias), rest = problem("")
    hidden, target = hidden.detach().flatten(0, 1), rest["target"].flatten()
    options = {"lse_square_scale": 0.02, "softcap": 5.0, "reduction": reduction}
    wanted = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    got = liger.LigerFusedLinearCrossEntropyLoss(**options, **wanted)(weight, hidden, target, bias)
    scores = 5.0 * torch.tanh((hidden @ weight.T + bias).detach() / 5.0)
    counts = target != -100
    z_loss, right = 0.02 * scores.logsumexp(-1) ** 2 * counts, (scores.argmax(-1) == target).float()
    if reduction != "none":
        z_loss, right = z_loss.sum() / (counts.sum() if reduction == "mean" else 1), right.sum() / counts.sum()
    torch.testing.assert_close(got.z_loss, z_loss)
    torch.testing.assert_close(got.token_accuracy, right)
    assert torch.equal(got.predicted_tokens, scores.argmax(-1).where(counts, -1))
    torch.testing.assert_close(
        got.loss, liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, target, bias)
    )
    assert liger.LigerFusedLinearCrossEntropyLoss(return_z_loss=True)(weight, hidden, target).predicted_tokens is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("LigerFusedLinearDPOLoss", {"label_smoothing": 0.1}, "label_smoothing"),
        (
            "LigerFusedLinearCrossEntropyLoss",
            {"use_token_scaling": True, "label_smoothing": 0.1},
            "use_token_scaling with",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_when_the_module_is_made(kind, options, message):
    with pytest.raises(NotImplementedError, match=message):
        getattr(liger, kind)(**options)


def test_an_unknown_reduction_is_named_when_the_module_is_made():
    with pytest.raises(ValueError, match=r"reduction must be one of .*got 'nope'"):
        liger.LigerFusedLinearCrossEntropyLoss(reduction="nope", use_token_scaling=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "aot"}, "loss_type.*'aot'"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0.*exo_pair"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\).*0.5"),
    ],
)
def test_a_wrong_option_of_dpo_is_named_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearDPOLoss(**options)


def test_a_reference_that_is_missing_is_named():
    (weight, hidden, _), rest = problem("")
    with pytest.raises(ValueError, match="ref_input and ref_weight"):
        liger.LigerFusedLinearDPOLoss()(weight, hidden, rest["target"])


def test_odds_of_a_sure_rejected_response_are_finite_with_their_gradient():
    hidden, weight = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[0.5, 200.0], [0.0, 0.0], [0.0, 0.0]])
    given = [x.requires_grad_() for x in (weight, hidden)]
    loss, logged = liger.LigerFusedLinearORPOLoss()(*given, torch.tensor([[0], [0]]))
    assert loss.isfinite() and all(x.isfinite().all() for x in logged)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, given))


def test_an_ignored_position_is_never_right_whatever_marks_it():
    (weight, hidden, bias), rest = problem("")
    hidden, target = hidden.detach().flatten(0, 1), rest["target"].flatten()
    module, found = liger.LigerFusedLinearCrossEntropyLoss, []
    for mark in (-100, -1):
        labels = target.where(target != -100, mark)
        found.append(module(ignore_index=mark, return_token_accuracy=True)(weight, hidden, labels, bias).token_accuracy)
    assert torch.equal(*found) and found[0] < 1


def test_the_mean_logits_are_float32_under_autocast():
    (weight, hidden, bias), _ = problem("")
    expected = mean_logits(hidden.bfloat16(), weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_logits(hidden.bfloat16(), weight, bias), expected)
