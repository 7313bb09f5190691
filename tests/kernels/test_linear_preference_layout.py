"""`linear_preference_loss` of sequences as they come: packed, shuffled, in micro-batches, partly or wholly empty."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from uneven_batch import LENGTHS, NAMES, Batch, budgets, heads, run

from wrpo_kernels import linear_preference_loss


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
