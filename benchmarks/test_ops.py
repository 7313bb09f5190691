"""pytest benchmarks/ [--benchmark-save=NAME] [--benchmark-compare=NAME]

One entry an op, for the change of one op between two states of a checkout: `--benchmark-save=before`, change, then
`--benchmark-compare=before`. What the rivals take, and memory and errors, are `python -m benchmarks.run`.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.suite.contestants import CONTESTANTS, FUSED
from benchmarks.suite.problem import IGNORED, Problem, Setting
from benchmarks.suite.timing import step_of
from wrpo_kernels import linear_token_logp, preference_loss, token_logp

pytest.importorskip("pytest_benchmark", reason="its fixture times the entries; `pip install pytest-benchmark`")

SMALL = Setting(8192, 128, examples=2, response=32, prompt=32)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.mark.benchmark(group="token_logp")
def test_token_logp_forward_and_backward(benchmark, dtype):
    logits = torch.randn(256, 32000).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(0, 32000, (256,))

    def step() -> None:
        logits.grad = None
        token_logp(logits, target).sum().backward()

    benchmark(step)
    assert logits.grad.isfinite().all()


@pytest.mark.benchmark(group="preference_loss")
def test_preference_loss_forward_and_backward(benchmark):
    problem = Problem(SMALL._replace(vocabulary=64, width=8, examples=128))
    logp = (problem.ref_logp + torch.randn_like(problem.ref_logp)).requires_grad_()
    layout = {"seq_weight": problem.seq_weight, "group": problem.group, "num_groups": problem.num_groups}

    def step() -> None:
        logp.grad = None
        preference_loss(logp, problem.ref_logp, beta=0.1, **layout).loss.backward()

    benchmark(step)
    assert logp.grad.isfinite().all()


@pytest.mark.benchmark(group="linear_token_logp")
@pytest.mark.parametrize("head", ["trained", "frozen", "no_grad"])
def test_linear_token_logp(benchmark, dtype, head):
    problem = Problem(SMALL._replace(dtype=dtype, head=head))
    target = problem.labels.flatten()

    def total() -> torch.Tensor:
        return linear_token_logp(problem.hidden.flatten(0, 1), problem.weight, target, ignore_index=IGNORED).sum()

    benchmark(step_of(problem, total))


@pytest.mark.benchmark(group="linear_preference_loss")
@pytest.mark.parametrize("head", ["trained", "frozen", "lora", "no_grad"])
@pytest.mark.parametrize("name", [FUSED.name, "plain torch"])
def test_linear_preference_loss(benchmark, dtype, head, name):
    problem = Problem(SMALL._replace(dtype=dtype, head=head))
    benchmark(step_of(problem, CONTESTANTS[name].loss(problem)))


@pytest.mark.benchmark(group="products")
@pytest.mark.parametrize("head", ["trained", "frozen", "no_grad"])
def test_the_floor_of_linear_preference_loss(benchmark, dtype, head):
    benchmark(Problem(SMALL._replace(dtype=dtype, head=head)).products())
