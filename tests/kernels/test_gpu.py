"""What only a CUDA device can show: streams, graphs, other devices, 2^31 elements, and that nothing waits.

`make test-gpu` runs this file and, on every GPU backend, the tests of the ops.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from conftest import HERE
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp, preference_loss, token_logp

PLACES = tuple(place for place in HERE if place[1] == "cuda")
pytestmark = pytest.mark.gpu


def rows(n: int, vocabulary: int, device: torch.device | str, dtype=torch.bfloat16) -> tuple[Tensor, Tensor]:
    logits = torch.randn(n, vocabulary, device=device, dtype=dtype)
    return logits.requires_grad_(), torch.randint(0, vocabulary, (n,), device=device)


def step(logits: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    logp = token_logp(logits, target, backend=backend)
    return logp.detach(), torch.autograd.grad(logp.sum(), logits)[0]


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        oracle.assert_same_bits("result", a, b)


@pytest.fixture
def kernels(backend: str) -> str:
    if backend == "reference":
        pytest.skip("plain torch waits for the device where it reads targets")
    return backend


def test_nothing_waits_for_the_device(kernels, device):
    logits, target = rows(64, 1009, device)
    logp = torch.randn(6, device=device, requires_grad=True)
    pairs = {"seq_weight": torch.ones(6, device=device), "group": torch.arange(6, device=device) // 2}
    step(logits, target, kernels)  # compiles where the backend compiles
    preference_loss(logp, **pairs, num_groups=3, beta=0.1, backend=kernels).loss.backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(logits, target, kernels)
        preference_loss(logp, **pairs, num_groups=3, beta=0.1, backend=kernels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_queues_behind_what_its_stream_is_doing(backend, device):
    logits, target = rows(64, 4099, device)
    expected = step(logits, target, backend)
    late = torch.zeros_like(logits).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms: on another stream the kernels would see zeros
        with torch.no_grad():
            late.copy_(logits)
        got = step(late, target, backend)
    stream.synchronize()
    assert_same(got, expected)


def test_a_cuda_graph_replays_on_new_logits(kernels, device):
    logits, target = rows(64, 1009, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(logits, target, kernels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(logits, target, kernels)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        target.copy_(torch.randint_like(target, 0, 1009))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, step(logits, target, kernels))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device or none")
def test_the_device_of_the_tensors_counts_not_the_current_one(backend, device):
    logits, target = rows(33, 4099, "cuda:0")
    expected = step(logits, target, backend)
    with torch.cuda.device(0):
        got = step(logits.detach().to("cuda:1").requires_grad_(), target.to("cuda:1"), backend)
        assert torch.cuda.current_device() == 0
    assert got[0].device.index == 1
    assert_same(tuple(x.to("cuda:0") for x in got), expected)


@pytest.mark.parametrize("vocabulary", [128256, 151936])
def test_more_than_two_to_the_31_elements_are_addressed(vocabulary, kernels, device):
    n = 2**31 // vocabulary + 3
    if torch.cuda.mem_get_info()[0] < 5 * n * vocabulary * 2:
        pytest.skip(f"needs {5 * n * vocabulary * 2 >> 30} GiB of free device memory")
    logits = torch.empty(n, vocabulary, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(0, vocabulary, (n,), device=device)
    got = step(logits, target, kernels)
    for few in (slice(0, 2), slice(n - 3, n)):
        expected = step(logits[few].detach().requires_grad_(), target[few], kernels)
        assert_same(tuple(x[few] for x in got), expected)


def test_a_wrong_target_leaves_the_device_usable(kernels, device):
    logits, target = rows(8, 1009, device)
    target[3] = 2**40
    logp, grad = step(logits, target, kernels)
    torch.cuda.synchronize()
    others = torch.arange(8, device=device) != 3
    assert logp[3].isnan()
    assert logp[others].isfinite().all()
    assert grad[others].isfinite().all()


@pytest.mark.parametrize("vocabulary", [301, 9001], ids=["small head", "larger head"])
@pytest.mark.parametrize("budget", [None, 1], ids=["all rows fit", "one row at a time"])
def test_a_wrong_label_makes_nan_of_what_it_enters_and_of_nothing_else(budget, vocabulary, kernels, device):
    """Its row, its sequence, its group and their gradients: a clamped label would be a silent wrong loss."""
    hidden = torch.randn(4, 9, 32, device=device).requires_grad_()
    weight = torch.randn(vocabulary, 32, device=device).requires_grad_()
    labels = torch.randint(0, vocabulary, (4, 9), device=device)
    labels[:, 0], labels[2, 5] = -100, vocabulary
    rest = {"budget_bytes": budget, "backend": kernels}
    tokens = linear_token_logp(hidden, weight, labels, **rest)
    assert tokens.isnan().nonzero().tolist() == [[2, 5]]
    (grad,) = torch.autograd.grad(tokens.sum(), hidden)
    assert grad.isnan().any(2).nonzero().tolist() == [[2, 5]]

    group = torch.tensor([0, 1, 0, 1], device=device)
    pairs = {"seq_weight": torch.tensor([1.0, 1.0, -1.0, -1.0], device=device), "group": group, "num_groups": 2}
    out = linear_preference_loss(hidden, weight, labels, beta=0.1, **pairs, **rest)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isnan()
    for values, wrong in ((out.logp, [2]), (out.reward, [2]), (out.margin, [0])):
        assert values.isnan().nonzero().flatten().tolist() == wrong
    assert torch.equal(grad.isnan().flatten(1).any(1), group == 0)


def test_the_fused_head_stays_within_its_budget_of_bytes(backend, device):
    hidden, weight = torch.randn(4096, 256, device=device).bfloat16(), torch.randn(32000, 256, device=device).bfloat16()
    target = torch.randint(0, 32000, (4096,), device=device)
    budget = 32 << 20
    with torch.no_grad():
        linear_token_logp(hidden, weight, target, budget_bytes=budget, backend=backend)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_token_logp(hidden, weight, target, budget_bytes=budget, backend=backend)
    slack = 3 << 20 if backend != "reference" else 24 << 20  # rows compacted, targets; the reference's float32 blocks
    assert torch.cuda.max_memory_allocated() - before <= budget + slack
