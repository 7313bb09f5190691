"""`linear_preference_loss`: loss, log-probs and gradients against float64, on every way that the budget leads."""

from __future__ import annotations

import math

import cases
import oracle
import pytest
import torch
from oracle import Transform
from torch import Tensor
from uneven_batch import PLAIN, SUBSETS, Batch, budgets, check, dtypes, heads, run

from wrpo_kernels import linear_token_logp, preference_loss


@dtypes
@heads
@budgets
def test_values_and_gradients_are_as_good_as_plain_torch(rows, head, dtype, backend, device):
    check(Batch(head, dtype, device), rows, backend)


FAMILY = {
    "label smoothing": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "simpo": {"beta": 10.0, "gamma": 1.0, "length_normalize": True, "ref_logp": None},
    "length normalised dpo": {"length_normalize": True, "beta": 2.0},
    "nll": {"nll_weight": 0.2},
    "nll of some": {"nll_weight": torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 0.3, 0.0, 2.0]), "length_normalize": True},
    "weighted groups": {"group_weight": torch.tensor([2.0, 0.0, 0.3])},
}


@heads
@pytest.mark.parametrize("rows", [None, 9], ids=["all fits", "half a group fits"])
@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_is_the_formula_in_float64(name, rows, head, backend, device):
    family = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in FAMILY[name].items()}
    check(Batch(head, torch.bfloat16, device), rows, backend, **family)


@heads
@pytest.mark.parametrize("rows", [None, 9], ids=["all fits", "half a group fits"])
@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_the_transform_of_the_logits_is_applied(name, rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    check(batch, rows, backend, cases.TRANSFORMS[name](batch.bias))


@heads
@pytest.mark.parametrize("rows", [None, 9], ids=["all fits", "half a group fits"])
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)) or "none")
def test_each_gradient_alone_is_as_good_as_plain_torch(wanted, rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    check(batch, rows, backend, Transform(bias=batch.bias), wanted)


@heads
@budgets
def test_the_loss_is_that_of_preference_loss_at_the_reported_logp(rows, head, backend, device):
    """One formula, whichever way the log-probs came."""
    batch = Batch(head, torch.bfloat16, device)
    rest = batch.options | {"beta": 0.1, "gamma": 0.2, "nll_weight": 0.1, "backend": backend}
    out, _ = run(batch, batch.tensors(False), {"hidden", "weight"}, budget_bytes=batch.budget(rows), **rest)
    again = preference_loss(out.logp, batch.ref_logp, **rest)
    for name, got, expected in zip(out._fields, out, again, strict=True):
        oracle.assert_same_bits(name, got, expected)


@heads
@budgets
def test_logp_is_the_sum_of_token_log_probs(rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    rest = {"budget_bytes": batch.budget(rows), "backend": backend}
    tokens = linear_token_logp(batch.hidden, batch.weight, batch.labels, **rest)
    out, _ = run(batch, batch.tensors(False), {"hidden", "weight"}, beta=0.1, **rest, **batch.options)
    true = tokens.double().sum(1)
    slack = batch.length * oracle.ulp(torch.tensor(12.0, device=device), torch.float32)  # products of other shapes
    oracle.assert_rule("logp", out.logp, true, true, slack + oracle.ulp(true, torch.float32))


@heads
@budgets
def test_policy_equal_to_the_reference_gives_log_2_exactly(rows, head, backend, device):
    """Step 0: the reference's log-probs are made by the forward alone, the policy's by the training pass. Exactly on
    the CPU, and on a GPU where both take the same rows at a time."""
    batch = Batch(head, torch.bfloat16, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    with torch.no_grad():
        reference, _ = run(batch, batch.tensors(False), set(), ref_logp=None, **rest)
    out, _ = run(batch, batch.tensors(False), {"hidden", "weight"}, ref_logp=reference.logp, **rest)
    if device.type == "cpu" or rows in (None, 1):
        oracle.assert_same_bits("logp", out.logp, reference.logp)
        assert float(out.loss.detach()) == float(torch.tensor(math.log(2.0)))
        return
    # The passes cut the rows differently, and cuBLAS adds up in another order for another number of rows: the logits
    # carry their error twice. The loss of a margin moves no faster than the margin.
    hidden = batch.hidden.where(batch.counts[..., None], 0.0)
    ones = torch.ones(batch.labels.shape, device=device)
    slack = oracle.linear_truth(hidden, batch.weight, batch.labels, ones, PLAIN).slack["logp"].sum(1)
    slack = 2 * slack + oracle.ulp(reference.logp, torch.float32)
    oracle.assert_rule("logp", out.logp, reference.logp.double(), reference.logp, slack)
    log_2 = torch.full_like(out.loss.double(), math.log(2.0))
    allowed = out.margin.double().abs().max() + oracle.ulp(log_2, torch.float32)
    oracle.assert_rule("loss", out.loss, log_2, log_2, allowed)
