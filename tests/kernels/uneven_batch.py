"""Sequences of uneven length behind prompts of uneven length, and the judge of what an op makes of them."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import DTYPES
from cost import budget_of
from oracle import Transform
from torch import Tensor

from wrpo_kernels import linear_preference_loss

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# A small head makes its gradients with the loss; a larger one keeps deltas, or takes the groups one by one.
HEADS = {"small head": (131, 24), "larger head": (1031, 257)}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
PLAIN = Transform()
GROUPS = torch.tensor([1, 0, 2, 0, 1, 0, 2, 1])
WEIGHTS = torch.tensor([0.1, 0.06, 1.0, 0.94, 0.9, -1.0, -1.0, -1.0])
LENGTHS = (3, 9, 1, 4, 12, 7, 5, 2)  # responses, behind prompts of uneven length


BUDGETS = {"all fits": None, "a group fits": 20, "half a group fits": 9, "one row": 1}  # rows; groups have 20, 17, 6
budgets = pytest.mark.parametrize("rows", BUDGETS.values(), ids=BUDGETS.keys())


class Batch:
    """Sequences of uneven length, padded to T; prompts and padding are ignored and hold NaN."""

    def __init__(self, head: tuple[int, int], dtype: torch.dtype, device: torch.device, steps: int = 16) -> None:
        vocabulary, width = head
        self.head, self.dtype = head, dtype
        self.hidden = torch.randn(len(LENGTHS), steps, width).to(dtype).to(device)
        self.weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).to(device)
        self.bias = torch.randn(vocabulary).to(dtype).to(device)
        self.labels = torch.randint(0, vocabulary, (len(LENGTHS), steps)).to(device)
        for s, length in enumerate(LENGTHS):
            self.labels[s, : s % 4] = -100
            self.labels[s, s % 4 + length :] = -100
        self.counts = self.labels != -100
        self.hidden[~self.counts] = torch.nan
        self.length = torch.tensor(LENGTHS, device=device)
        self.ref_logp = (-5.0 * self.length + torch.randn(len(LENGTHS), device=device)).to(torch.float32)
        self.options = {"seq_weight": WEIGHTS.to(device), "group": GROUPS.to(device), "num_groups": 3}

    def tensors(self, bias: bool = True) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "weight": self.weight} | ({"bias": self.bias} if bias else {})

    def budget(self, rows: int | None) -> int | None:
        return None if rows is None else budget_of(rows, *self.head, self.dtype)


def run(batch: Batch, tensors: dict[str, Tensor], wanted: set[str], c: Tensor | float | None = None, **options):
    """The output and the gradients of `c * loss` with respect to `wanted` alone."""
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    ref_logp = options.pop("ref_logp", batch.ref_logp)
    out = linear_preference_loss(labels=batch.labels, ref_logp=ref_logp, **given, **options)
    if not wanted:
        return out, {}
    c = torch.ones_like(out.loss) if c is None else torch.as_tensor(c, dtype=out.loss.dtype, device=out.loss.device)
    return out, oracle.gradients(out.loss, {name: given[name] for name in tensors if name in wanted}, c)


def check(
    batch: Batch,
    rows: int | None,
    backend: str,
    transform: Transform = PLAIN,
    wanted: set[str] | None = None,
    **family,
) -> None:
    """Log-probs, loss, rewards, margins and gradients, each judged at what it was computed from.

    Rewards, margins and the loss are the formula at the log-probs that the op reports; the gradients are those of
    float64 token log-probs under the coefficients at the same. So every slack is that of one step.
    """
    options = batch.options | {"beta": 0.1} | family
    ref_logp = options.pop("ref_logp", batch.ref_logp)
    tensors = batch.tensors(bias=transform.bias is not None)
    wanted = set(tensors) if wanted is None else wanted
    rest = {name: value for name, value in transform._asdict().items() if name != "bias"}
    budget = batch.budget(rows)
    out, grads = run(batch, tensors, wanted, ref_logp=ref_logp, budget_bytes=budget, backend=backend, **rest, **options)

    at = out.logp.double().requires_grad_()
    truth = oracle.preference_truth(at, ref_logp, length=batch.length, **options)
    for field in ("reward", "margin"):
        true = getattr(truth, field).detach()
        oracle.assert_rule(field, getattr(out, field), true, true, oracle.ulp(true, torch.float32))
    loss = truth.loss.mean()
    oracle.assert_rule("loss", out.loss, loss.detach(), loss, 3 * oracle.ulp(loss.detach(), torch.float32))
    (coef,) = torch.autograd.grad(loss, at)

    passes = int(batch.counts.sum())  # a share of dW is rounded once for each, and before it is scaled
    hidden = batch.hidden.where(batch.counts[..., None], 0.0)
    c = coef[:, None].expand(batch.labels.shape)
    exact = oracle.linear_truth(hidden, batch.weight, batch.labels, c, transform, passes=passes)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in (tensors | {"hidden": hidden}).items()}
    plain = oracle.plain_linear_token_logp(
        leaves["hidden"], leaves["weight"], batch.labels, transform._replace(bias=leaves.get("bias"))
    )
    slack = exact.slack["logp"].sum(1) + oracle.ulp(exact.logp.sum(1), torch.float32)
    oracle.assert_rule("logp", out.logp, exact.logp.sum(1), plain.sum(1), slack)
    plain_grads = oracle.gradients(plain, leaves, c)
    for name in wanted:
        assert grads[name].dtype == tensors[name].dtype
        oracle.assert_rule(f"grad_{name}", grads[name], exact.grads[name], plain_grads[name], exact.slack[name])


NAMES = ("hidden", "weight", "bias")
SUBSETS = [set(subset) for count in (0, 1, 2, 3) for subset in itertools.combinations(NAMES, count)]
