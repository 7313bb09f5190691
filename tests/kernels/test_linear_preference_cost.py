"""What `linear_preference_loss` costs: products of the rows that count, and memory within the budget."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch
from cost import budget_of, measured, product_flops
from fuzz import backends_here
from uneven_batch import heads

from wrpo_kernels import linear_wrpo_loss

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
def test_memory_stays_within_the_budget_and_does_not_grow_with_the_length():
    backends = backends_here()
    measures = measured(f"""
        from wrpo_kernels import linear_wrpo_loss
        V, D, MiB = 8192, 64, 1 << 20
        result = {{}}
        weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_()
        for backend in {backends}:
            for steps in (16, 160, 640):
                hidden = torch.randn(3, steps, D, dtype=torch.bfloat16).requires_grad_()
                labels = torch.randint(0, V, (3, steps))
                for kind in ("no_grad", "frozen", "trained"):
                    def call():
                        with torch.set_grad_enabled(kind != "no_grad"):
                            w = weight.detach() if kind == "frozen" else weight
                            options = {{"alpha": 0.1, "budget_bytes": 4 * MiB, "backend": backend}}
                            loss = linear_wrpo_loss(hidden, w, labels, **options).loss
                        leaves = [hidden] + [weight] * (kind == "trained")
                        return loss.detach(), kind == "no_grad" or torch.autograd.grad(loss, leaves)
                    result[f"{{backend}} {{kind}} {{steps}}"] = growth(call) / MiB
    """)
    gradients = {"no_grad": 0, "frozen": 0.25, "trained": 0.25 + 1 + 2}  # of a trained head its float32 total too
    for name, megabytes in measures.items():
        _, kind, steps = name.split()
        if steps != "16":  # the first calls: what the library and the matrix products set up once
            assert megabytes <= 4 + 32 + gradients[kind], f"{name} steps: {megabytes:.0f} MiB; all: {measures}"
    for backend, kind in product(backends, gradients):  # the logits of 1440 rows more would be 22 MiB more
        assert measures[f"{backend} {kind} 640"] <= measures[f"{backend} {kind} 160"] + 6, measures
