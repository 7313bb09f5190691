"""`linear_preference_loss`: loss, log-probs and gradients against float64, on every way that the budget leads."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import cases
import oracle
import pytest
import torch
from cases import DTYPES
from cost import budget_of, measured, product_flops
from oracle import Transform
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp, linear_wrpo_loss, preference_loss
from wrpo_kernels.lm_head import products

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
    "more groups than used": {"num_groups": 5},
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


NAMES = ("hidden", "weight", "bias")
SUBSETS = [set(subset) for count in (0, 1, 2, 3) for subset in itertools.combinations(NAMES, count)]


@heads
@pytest.mark.parametrize("rows", [None, 9], ids=["all fits", "half a group fits"])
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)) or "none")
def test_each_gradient_alone_is_as_good_as_plain_torch(wanted, rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    check(batch, rows, backend, Transform(bias=batch.bias), wanted)


@heads
@budgets
@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)) or "none")
def test_only_what_requires_grad_gets_one_and_only_the_loss_carries_it(wanted, rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in batch.tensors().items()}
    out = linear_preference_loss(
        labels=batch.labels,
        ref_logp=batch.ref_logp,
        beta=0.1,
        budget_bytes=batch.budget(rows),
        backend=backend,
        **given,
        **batch.options,
    )
    assert out.loss.requires_grad == bool(wanted)
    assert not any(value.requires_grad for value in out[1:])
    assert all(value.dtype == torch.float32 for value in out)
    if wanted:
        out.loss.backward()
    assert {name for name, tensor in given.items() if tensor.grad is not None} == wanted


@heads
@budgets
@pytest.mark.parametrize("c", [-2.5, 0.0, 1e-3])
def test_the_upstream_gradient_scales_all_gradients(c, rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    _, ones = run(batch, batch.tensors(), set(NAMES), **rest)
    _, scaled = run(batch, batch.tensors(), set(NAMES), c, **rest)
    for name in NAMES:
        true = c * ones[name].double()
        size = abs(c) * float(ones[name].abs().amax()) * torch.finfo(torch.float32).eps
        oracle.assert_rule(f"grad_{name}", scaled[name], true, true, torch.full_like(true, 4 * size))


@heads
@budgets
def test_without_reduction_each_group_has_its_own_upstream_gradient(rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    c = torch.tensor([0.0, -1.0, 2.0], device=device)
    out, grads = run(batch, batch.tensors(), set(NAMES), c, reduction="none", **rest)
    assert out.loss.shape == (3,)
    off = batch.options["group"] == 0
    assert not grads["hidden"][off].any()
    _, weighted = run(batch, batch.tensors(), set(NAMES), group_weight=c, reduction="sum", **rest)
    for name in NAMES:  # products in chunks of other sizes: two errors of the logits, some ulp of about 10 each
        size = float(weighted[name].abs().amax()) * torch.finfo(torch.float32).eps
        true = weighted[name].double()
        oracle.assert_rule(f"grad_{name}", grads[name], true, true, torch.full_like(true, 32 * size))


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
@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_give_what_padded_ones_give(bounds_dtype, rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    padded, padded_grads = run(batch, batch.tensors(False), {"hidden", "weight"}, **rest)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=bounds_dtype, device=device)
    given = {"hidden": batch.hidden[batch.counts].requires_grad_(), "weight": batch.weight.detach().requires_grad_()}
    packed = linear_preference_loss(
        labels=batch.labels[batch.counts], ref_logp=batch.ref_logp, cu_seqlens=bounds, **given, **rest
    )
    packed_grads = oracle.gradients(packed.loss, given, torch.ones_like(packed.loss))
    for name, got, expected in zip(padded._fields, packed, padded, strict=True):
        oracle.assert_same_bits(name, got, expected)
    oracle.assert_same_bits("grad_hidden", packed_grads["hidden"], padded_grads["hidden"][batch.counts])
    oracle.assert_same_bits("grad_weight", packed_grads["weight"], padded_grads["weight"])


@heads
@budgets
def test_packed_rows_may_be_ignored_too(rows, head, backend, device):
    """Prompts left in the packed form, and sequences bounded by cu_seqlens rather than by what counts."""
    batch = Batch(head, torch.float32, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    padded, _ = run(batch, batch.tensors(False), {"hidden", "weight"}, **rest)
    size = batch.labels.shape[1]
    bounds = torch.arange(0, (len(LENGTHS) + 1) * size, size, device=device)
    given = {"hidden": batch.hidden.flatten(0, 1).requires_grad_(), "weight": batch.weight.detach().requires_grad_()}
    packed = linear_preference_loss(
        labels=batch.labels.flatten(), ref_logp=batch.ref_logp, cu_seqlens=bounds, **given, **rest
    )
    for name, got, expected in zip(padded._fields, packed, padded, strict=True):
        oracle.assert_same_bits(name, got, expected)


@heads
@budgets
def test_the_order_of_the_sequences_does_not_matter(rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    rest = {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    out, grads = run(batch, batch.tensors(False), {"hidden", "weight"}, **rest, **batch.options)
    order = torch.randperm(len(LENGTHS), device=device)
    hidden = batch.hidden[order].requires_grad_()
    shuffled = linear_preference_loss(
        hidden,
        batch.weight,
        batch.labels[order],
        batch.ref_logp[order],
        seq_weight=batch.options["seq_weight"][order],
        group=batch.options["group"][order],
        num_groups=3,
        **rest,
    )
    slack = 4 * batch.length * oracle.ulp(torch.tensor(12.0, device=device), torch.float32)
    oracle.assert_rule("logp", shuffled.logp, out.logp[order].double(), out.logp[order], slack[order])
    (grad,) = torch.autograd.grad(shuffled.loss, hidden)
    true = grads["hidden"][order].double()
    size = float(true.abs().amax()) * torch.finfo(torch.float32).eps
    oracle.assert_rule("grad_hidden", grad, true, true, torch.full_like(true, 32 * size))


@heads
@budgets
def test_uneven_micro_batches_add_up(rows, head, backend, device):
    """Groups 0 and 1 in one micro-batch, group 2 in the next, each divided by the 3 of the whole batch."""
    batch = Batch(head, torch.float32, device)
    rest = {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    whole, grads = run(batch, batch.tensors(False), {"hidden", "weight"}, **rest, **batch.options)
    weight, loss = batch.weight.detach().requires_grad_(), 0.0
    for groups in ((0, 1), (2,)):
        of = torch.isin(batch.options["group"], torch.tensor(groups, device=device))
        out = linear_preference_loss(
            batch.hidden[of],
            weight,
            batch.labels[of],
            batch.ref_logp[of],
            seq_weight=batch.options["seq_weight"][of],
            group=batch.options["group"][of] - groups[0],
            normalizer=3,
            **rest,
        )
        out.loss.backward()
        loss = loss + out.loss.detach()
    eps = torch.finfo(torch.float32).eps
    oracle.assert_rule("loss", loss, whole.loss.detach().double(), whole.loss, 64 * eps * whole.loss.detach().double())
    true = grads["weight"].double()
    oracle.assert_rule(
        "grad_weight", weight.grad, true, true, torch.full_like(true, 32 * eps * float(true.abs().amax()))
    )


@heads
@budgets
def test_what_stands_in_ignored_positions_gets_a_gradient_of_zero(rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)  # its prompts and padding hold NaN
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    _, grads = run(batch, batch.tensors(), set(NAMES), **rest)
    _, frozen = run(batch, batch.tensors(), {"hidden"}, **rest)
    for gradient in (grads["hidden"], frozen["hidden"]):
        assert not gradient[~batch.counts].any()  # exactly 0, and NaN would count as True
    assert all(grad.isfinite().all() for grad in grads.values())


@heads
@budgets
def test_a_second_run_gives_the_same_bits(rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    (a, a_grads), (b, b_grads) = (run(batch, batch.tensors(), set(NAMES), **rest) for _ in range(2))
    for name, got, expected in zip(a._fields, b, a, strict=True):
        oracle.assert_same_bits(name, got, expected)
    for name in NAMES:
        oracle.assert_same_bits(f"grad_{name}", b_grads[name], a_grads[name])


@heads
@budgets
@pytest.mark.parametrize("wanted", [{"hidden"}, {"hidden", "weight"}], ids=["frozen head", "trained head"])
def test_the_graph_can_be_walked_twice_and_inputs_stay(wanted, rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    before = {name: tensor.clone() for name, tensor in batch.tensors().items()}
    given = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in batch.tensors().items()}
    loss = linear_preference_loss(
        labels=batch.labels,
        ref_logp=batch.ref_logp,
        beta=0.1,
        budget_bytes=batch.budget(rows),
        backend=backend,
        **given,
        **batch.options,
    ).loss
    leaves = [given[name] for name in sorted(wanted)]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        oracle.assert_same_bits("grad", b, a)
    for name, tensor in before.items():
        oracle.assert_same_bits(name, given[name], tensor)


@heads
@budgets
@pytest.mark.parametrize("factor", [1.0, -0.75])
def test_the_gradients_of_a_kept_graph_are_the_callers_own(factor, rows, head, backend, device):
    """What the caller does to them is not in those of the next walk, nor are those of the last one scaled twice."""
    batch = Batch(head, torch.float32, device)
    rest = batch.options | {"ref_logp": batch.ref_logp, "beta": 0.1, "budget_bytes": batch.budget(rows)}
    given = {name: tensor.detach().requires_grad_() for name, tensor in batch.tensors().items()}
    loss = factor * linear_preference_loss(labels=batch.labels, backend=backend, **rest, **given).loss
    walks = []
    for keep in (True, True, False):
        grads = torch.autograd.grad(loss, list(given.values()), retain_graph=keep)
        walks.append([grad.clone() for grad in grads])
        for grad in grads:
            grad.zero_()
    for again in walks[1:]:
        for name, got, expected in zip(given, again, walks[0], strict=True):
            oracle.assert_same_bits(name, got, expected)


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


@heads
@budgets
@pytest.mark.parametrize("length_normalize", [False, True])
def test_an_empty_response_is_an_error_or_switches_its_group_off(length_normalize, rows, head, backend, device):
    batch = Batch(head, torch.float32, device)
    batch.labels[6] = -100  # of group 2
    batch.hidden[6] = torch.nan
    rest = {"beta": 0.1, "length_normalize": length_normalize, "nll_weight": 0.1, "backend": backend}
    rest["budget_bytes"] = batch.budget(rows)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="sequence 6 has no counted token"):
            run(batch, batch.tensors(False), {"hidden", "weight"}, **rest, **batch.options)
    else:  # reading the lengths would wait for the device
        out, grads = run(batch, batch.tensors(False), {"hidden", "weight"}, **rest, **batch.options)
        assert float(out.logp[6]) == 0
        assert all(value.isfinite().all() for value in (*out, *grads.values()))
    out, grads = run(batch, batch.tensors(False), {"hidden", "weight"}, empty="zero", **rest, **batch.options)
    kept = batch.options["group"] != 2
    hidden = batch.hidden[kept].requires_grad_()
    alone = linear_preference_loss(
        hidden,
        batch.weight,
        batch.labels[kept],
        batch.ref_logp[kept],
        seq_weight=batch.options["seq_weight"][kept],
        group=batch.options["group"][kept],
        **rest,
    )
    eps = torch.finfo(torch.float32).eps
    oracle.assert_rule("loss", out.loss, alone.loss.detach().double(), alone.loss, 64 * eps * alone.loss.detach().abs())
    (true,) = torch.autograd.grad(alone.loss, hidden)
    slack = torch.full_like(true, 32 * eps * float(true.abs().amax()))
    oracle.assert_rule("grad_hidden", grads["hidden"][kept], true.double(), true, slack)
    assert not grads["hidden"][~kept].any()
    assert grads["weight"].isfinite().all()
    assert all(value.isfinite().all() for value in out)


@heads
@budgets
@pytest.mark.parametrize("sequences", [8, 0])
def test_a_batch_without_any_counted_token_gives_zero_not_nan(sequences, rows, head, backend, device):
    batch = Batch(head, torch.bfloat16, device)
    batch.labels = torch.full_like(batch.labels, -100)[:sequences]
    given = {
        "hidden": batch.hidden[:sequences].requires_grad_(),
        "weight": batch.weight.requires_grad_(),
        "bias": batch.bias.requires_grad_(),
    }
    out = linear_preference_loss(
        labels=batch.labels,
        ref_logp=batch.ref_logp[:sequences],
        seq_weight=batch.options["seq_weight"][:sequences],
        group=batch.options["group"][:sequences],
        beta=0.1,
        empty="zero",
        budget_bytes=batch.budget(rows),
        backend=backend,
        **given,
    )
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not any(tensor.grad.any() for tensor in given.values())


def test_graphs_that_live_at_the_same_time_do_not_share_memory(place, device):
    """Forward, forward, backward, backward."""
    hidden = torch.randn(2, 3, 40, 64, device=device)
    weight, labels = torch.randn(32000, 64, device=device) / 8, torch.randint(0, 32000, (2, 3, 40), device=device)

    def loss(n: int, w: Tensor) -> Tensor:
        return linear_wrpo_loss(hidden[n], w, labels[n], alpha=0.1, beta=0.1, backend=place[0]).loss

    alone = []
    for n in (0, 1):
        w = weight.clone().requires_grad_()
        alone.append(torch.autograd.grad(loss(n, w), w)[0])
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    losses = [loss(n, w) for n, w in enumerate(leaves)]
    for n in (0, 1):
        oracle.assert_same_bits("grad", torch.autograd.grad(losses[n], leaves[n])[0], alone[n])


def test_calls_from_several_threads_do_not_share_memory(place, device):
    hidden = torch.randn(4, 3, 40, 64, device=device)
    weight, labels = torch.randn(32000, 64, device=device) / 8, torch.randint(0, 32000, (4, 3, 40), device=device)

    def gradient(n: int) -> Tensor:
        torch.use_deterministic_algorithms(False)  # the poison of the tests is slow, and global
        w = weight.clone().requires_grad_()
        loss = linear_wrpo_loss(hidden[n], w, labels[n], alpha=0.1, beta=0.1, backend=place[0]).loss
        return torch.autograd.grad(loss, w)[0]

    alone = [gradient(n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, range(4)))
    for n in range(4):
        oracle.assert_same_bits("grad", together[n], alone[n])


@heads
@budgets
def test_each_gradient_has_the_dtype_of_its_tensor(rows, head, backend, device):
    """bfloat16 hidden states under a float32 head: the mixed precision of sharded training."""
    batch = Batch(head, torch.bfloat16, device)
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": backend}
    batch.bias = batch.bias.float()  # in both: a kernel compiled for another type of bias may round a delta otherwise
    _, expected = run(batch, batch.tensors(), set(NAMES), **rest)
    batch.weight = batch.weight.float()  # exactly: it was rounded before
    _, grads = run(batch, batch.tensors(), set(NAMES), **rest)
    assert [grads[name].dtype for name in NAMES] == [torch.bfloat16, torch.float32, torch.float32]
    for name in NAMES:
        true = expected[name].double()
        slack = oracle.ulp(true, torch.bfloat16)  # one of the two was rounded to bfloat16 at the end
        oracle.assert_rule(f"grad_{name}", grads[name], true, true, slack)


@heads
@budgets
def test_a_float32_head_gets_the_float32_sums_of_16_bit_products(rows, head, place, device, monkeypatch):
    """Wherever a product can leave them: on a GPU, and on a CPU that widens. None is rounded to bfloat16 on the way."""
    if place[1] == "cpu":
        monkeypatch.setattr(products, "multiplies", lambda dtype: dtype.itemsize != 2)
    batch = Batch(head, torch.bfloat16, device)
    batch.weight = batch.weight.float()
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": place[0]}
    _, grads = run(batch, batch.tensors(bias=False), {"hidden", "weight"}, **rest)
    grad = grads["weight"]
    assert grad.dtype == torch.float32
    assert float((grad != grad.bfloat16()).double().mean()) > 0.9


STEPS, COUNTED = 12, 8  # positions of a sequence, and those that count


def cost(head: tuple[int, int], rows: int | None, wanted: set[str], backend: str, device: torch.device) -> float:
    """Flops of a training step of four groups of three sequences, in products of the rows that count."""
    vocabulary, width = head
    tensors = {
        "hidden": torch.randn(12, STEPS, width, device=device),
        "weight": torch.randn(vocabulary, width, device=device),
    }
    labels = torch.randint(0, vocabulary, (12, STEPS), device=device)
    labels[:, : STEPS - COUNTED] = -100
    for name in wanted:
        tensors[name].requires_grad_()
    budget = None if rows is None else budget_of(rows, *head, torch.float32)

    def call():
        out = linear_wrpo_loss(labels=labels, alpha=0.1, budget_bytes=budget, backend=backend, **tensors)
        if out.loss.requires_grad:
            out.loss.backward()

    return product_flops(call) / (2 * 12 * COUNTED * vocabulary * width)


GROUP = 3 * COUNTED  # rows


@heads
@pytest.mark.parametrize("rows", [None, GROUP, 4])
def test_the_forward_alone_is_one_product_whatever_the_budget(rows, head, backend, device):
    assert cost(head, rows, set(), backend, device) == 1
    with torch.no_grad():
        assert cost(head, rows, {"hidden", "weight"}, backend, device) == 1


@heads
@pytest.mark.parametrize("rows", [None, GROUP, 4])
def test_a_frozen_head_is_two_products_whatever_the_budget(rows, head, backend, device):
    assert cost(head, rows, {"hidden"}, backend, device) == 2


@heads
@pytest.mark.parametrize("rows", [None, 2 * GROUP, GROUP])
def test_a_trained_head_is_three_products_while_one_group_fits(rows, head, backend, device):
    assert cost(head, rows, {"hidden", "weight"}, backend, device) == 3
    assert cost(head, rows, {"weight"}, backend, device) == 2


@heads
def test_rows_of_a_group_that_do_not_fit_are_computed_once_more(head, backend, device):
    for rows in (GROUP, GROUP - 1, GROUP // 2, 4):
        assert cost(head, rows, {"hidden", "weight"}, backend, device) == pytest.approx(4 - rows / GROUP)


@heads
def test_without_reduction_a_trained_head_costs_four_products_at_most(head, backend, device):
    options = {"reduction": "none"}
    vocabulary, width = head
    hidden = torch.randn(12, STEPS, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, requires_grad=True)
    labels = torch.randint(0, vocabulary, (12, STEPS), device=device)
    for rows, most in ((None, 3), (GROUP, 4)):
        budget = None if rows is None else budget_of(rows, *head, torch.float32)

        def call(budget=budget):
            out = linear_wrpo_loss(hidden, weight, labels, alpha=0.1, budget_bytes=budget, backend=backend, **options)
            out.loss.sum().backward()

        assert product_flops(call) / (2 * 12 * STEPS * vocabulary * width) <= most


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_within_the_budget_and_does_not_grow_with_the_length(place):
    if place[1] != "cpu":
        pytest.skip("resident memory says nothing of a device's memory")
    measures = measured(f"""
        from wrpo_kernels import linear_wrpo_loss
        V, D, MiB = 8192, 256, 1 << 20
        result = {{}}
        weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_()
        for steps in (16, 160, 640):
            hidden = torch.randn(3, steps, D, dtype=torch.bfloat16).requires_grad_()
            labels = torch.randint(0, V, (3, steps))
            for kind in ("no_grad", "frozen", "trained"):
                def call():
                    with torch.set_grad_enabled(kind != "no_grad"):
                        w = weight.detach() if kind == "frozen" else weight
                        loss = linear_wrpo_loss(
                            hidden, w, labels, alpha=0.1, budget_bytes=4 * MiB, backend={place[0]!r}
                        ).loss
                    leaves = [hidden] + [weight] * (kind == "trained")
                    return loss.detach(), kind == "no_grad" or torch.autograd.grad(loss, leaves)
                result[f"{{kind}} {{steps}}"] = growth(call) / MiB
    """)
    for name, megabytes in measures.items():
        kind, steps = name.split()
        if steps == "16":
            continue  # the first calls: what the library and the matrix products set up once
        gradients = {"no_grad": 0, "frozen": 1, "trained": 1 + 4 + 8}[kind]  # a trained head: and its float32 total
        assert megabytes <= 4 + 32 + gradients, f"{name} steps: {megabytes:.0f} MiB; all: {measures}"
    for kind in ("no_grad", "frozen", "trained"):  # the logits of 1440 rows more would be 22 MiB more
        assert measures[f"{kind} 640"] <= measures[f"{kind} 160"] + 6, measures


GOOD = {
    "hidden": torch.zeros(6, 3, 4),
    "weight": torch.zeros(5, 4),
    "labels": torch.zeros(6, 3, dtype=torch.int64),
    "seq_weight": torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]),
    "group": torch.tensor([0, 1, 2, 0, 1, 2]),
    "beta": 0.1,
}
PACKED = {"hidden": torch.zeros(18, 4), "labels": torch.zeros(18, dtype=torch.int64)}


def bounds(*values: int, dtype: torch.dtype = torch.int64) -> dict:
    return PACKED | {"cu_seqlens": torch.tensor(values, dtype=dtype)}


REFUSED = {
    "labels of another type": ({"labels": [[0]]}, TypeError, "labels.*list"),
    "float labels": ({"labels": torch.zeros(6, 3)}, ValueError, "labels.*int64.*float32"),
    "labels of another shape": ({"labels": torch.zeros(6, 4).long()}, ValueError, r"labels.*\[6, 3\].*\[6, 4\]"),
    "labels elsewhere": ({"labels": torch.zeros(6, 3).long().to("meta")}, ValueError, "labels.*cpu.*meta"),
    "label V": ({"labels": torch.full((6, 3), 5)}, ValueError, "labels.*V ?= ?5.*5"),
    "label -1": ({"labels": torch.full((6, 3), -1)}, ValueError, "labels.*-1"),
    "sparse hidden": ({"hidden": torch.zeros(6, 3, 4).to_sparse()}, ValueError, r"hidden.*dense.*sparse_coo.*to_dense"),
    "sparse weight": (
        {"weight": torch.zeros(5, 4).to_sparse()},
        ValueError,
        r"weight.*dense.*sparse_coo.*to_dense",
    ),
    "hidden of another type": ({"hidden": None}, TypeError, "hidden.*NoneType"),
    "hidden of another width": ({"hidden": torch.zeros(6, 3, 5)}, ValueError, r"hidden.*D=4.*\[6, 3, 5\]"),
    "packed without cu_seqlens": (PACKED, ValueError, r"labels.*\[S, T\].*cu_seqlens.*\[18\]"),
    "four dimensions": (
        {"hidden": torch.zeros(2, 3, 3, 4), "labels": torch.zeros(2, 3, 3).long()},
        ValueError,
        r"labels.*\[S, T\].*\[2, 3, 3\]",
    ),
    "weight a vector": ({"weight": torch.zeros(4)}, ValueError, r"weight.*\[V, D\].*\[4\]"),
    "bias of another shape": ({"bias": torch.zeros(4)}, ValueError, r"bias.*\[5\].*\[4\]"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap.*-1"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
    "ref_logp of tokens": ({"ref_logp": torch.zeros(6, 3)}, ValueError, r"ref_logp.*\[S\].*\[6\].*\[6, 3\]"),
    "ref_logp that wants a gradient": ({"ref_logp": torch.zeros(6, requires_grad=True)}, ValueError, "ref_logp.*grad"),
    "half-precision ref_logp": ({"ref_logp": torch.zeros(6).half()}, ValueError, "ref_logp.*float32.*float16"),
    "seq_weight of another length": ({"seq_weight": torch.ones(3)}, ValueError, r"seq_weight.*\[6\].*\[3\]"),
    "group of another length": ({"group": torch.zeros(3).long()}, ValueError, r"group.*\[6\].*\[3\]"),
    "group beyond G": ({"num_groups": 2}, ValueError, "group.*G=2.*2"),
    "negative group": ({"group": torch.tensor([0, 1, 2, 0, -1, 2])}, ValueError, "group.*-1"),
    "group_weight of another length": ({"group_weight": torch.ones(2)}, ValueError, r"group_weight.*\[3\].*\[2\]"),
    "nll_weight of another length": ({"nll_weight": torch.ones(2)}, ValueError, r"nll_weight.*\[6\].*\[2\]"),
    "beta 0": ({"beta": 0.0}, ValueError, "beta.*> 0"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta.*str"),
    "NaN gamma": ({"gamma": math.nan}, ValueError, "gamma.*nan"),
    "gamma as text": ({"gamma": "1"}, TypeError, "gamma.*str"),
    "smoothing 1/2": ({"label_smoothing": 0.5}, ValueError, "label_smoothing"),
    "unknown loss": ({"loss_type": "dpo"}, ValueError, "loss_type.*'dpo'"),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction.*'avg'"),
    "normalizer of a sum": ({"normalizer": 8, "reduction": "sum"}, ValueError, "normalizer.*'sum'"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer.*0"),
    "unknown empty": ({"empty": "skip"}, ValueError, "empty.*'skip'"),
    "no budget": ({"budget_bytes": 0}, ValueError, "budget_bytes.*0"),
    "budget as text": ({"budget_bytes": "1GB"}, TypeError, "budget_bytes.*str"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend.*'fast'"),
    "length given twice": ({"length": torch.ones(6).long()}, TypeError, "length"),
    "cu_seqlens of padded labels": ({"cu_seqlens": torch.tensor([0, 18])}, ValueError, r"labels.*\[N\].*\[6, 3\]"),
    "cu_seqlens a list": (PACKED | {"cu_seqlens": [0, 18]}, TypeError, "cu_seqlens.*list"),
    "float cu_seqlens": (PACKED | {"cu_seqlens": torch.arange(0.0, 19, 3)}, ValueError, "cu_seqlens.*int32.*float32"),
    "cu_seqlens a matrix": (PACKED | {"cu_seqlens": torch.zeros(7, 1).long()}, ValueError, r"cu_seqlens.*\[7, 1\]"),
    "cu_seqlens empty": (PACKED | {"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens.*\[S\+1\].*\[0\]"),
    "cu_seqlens that falls": (bounds(0, 3, 9, 6, 12, 15, 18), ValueError, r"cu_seqlens.*rise.*N=18.*9, 6"),
    "cu_seqlens from 1": (bounds(1, 3, 6, 9, 12, 15, 18), ValueError, r"cu_seqlens.*0 to N=18.*\[1, 3"),
    "cu_seqlens that ends early": (bounds(0, 3, 6, 9, 12, 15, 17), ValueError, "cu_seqlens.*N=18.*17"),
    "cu_seqlens beyond the rows": (bounds(0, 3, 6, 9, 12, 15, 19), ValueError, "cu_seqlens.*N=18.*19"),
    "cu_seqlens of fewer sequences": (bounds(0, 9, 18), ValueError, r"(seq_weight|group).*\[2\].*\[6\]"),
    "an empty packed sequence": (bounds(0, 3, 3, 9, 12, 15, 18), ValueError, "sequence 1 has no counted token"),
}


@pytest.mark.parametrize("trained", [False, True], ids=["no gradient", "trained head"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name, trained):
    changes, error, message = REFUSED[name]
    arguments = {**GOOD, **changes}
    if trained and isinstance(arguments["weight"], Tensor):
        arguments["weight"] = arguments["weight"].clone().requires_grad_()
    with pytest.raises(error, match=f"(?s){message}"):
        linear_preference_loss(**arguments)


@budgets
@heads
def test_the_position_of_a_wrong_label_is_the_users(head, rows, backend, device):
    """Its number in the flattened labels, not among the rows that count nor within a chunk."""
    batch = Batch(head, torch.float32, device)
    batch.labels[4, 5] = head[0]
    read = torch.autograd.set_detect_anomaly(device.type == "cuda")  # there the kernels read labels only when asked
    with read, pytest.raises(ValueError, match=rf"labels\[(69|4, 5)\].*V ?= ?{head[0]}.*{head[0]}"):
        run(
            batch,
            batch.tensors(False),
            {"hidden", "weight"},
            beta=0.1,
            budget_bytes=batch.budget(rows),
            backend=backend,
            **batch.options,
        )
