"""`linear_preference_loss` in autograd: which gradients there are, of which type, and whose memory they are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from torch import Tensor
from uneven_batch import NAMES, SUBSETS, Batch, budgets, heads, run

from wrpo_kernels import linear_preference_loss, linear_wrpo_loss
from wrpo_kernels.lm_head import products


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
        monkeypatch.setattr(products, "multiplies_fast", lambda dtype: dtype.itemsize != 2)
    batch = Batch(head, torch.bfloat16, device)
    batch.weight = batch.weight.float()
    rest = batch.options | {"beta": 0.1, "budget_bytes": batch.budget(rows), "backend": place[0]}
    _, grads = run(batch, batch.tensors(bias=False), {"hidden", "weight"}, **rest)
    grad = grads["weight"]
    assert grad.dtype == torch.float32
    assert float((grad != grad.bfloat16()).double().mean()) > 0.9
