"""The loss of supervised fine-tuning: its formula in float64, and one walk over the rows at any budget."""

from __future__ import annotations

import pytest
import torch
from cost import budget_of, product_flops
from torch import Tensor

from wrpo_kernels import linear_nll_loss

S, T, D, V, R = 5, 7, 9, 31, 3
SEQ_WEIGHT = torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0], dtype=torch.float64)


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(3)
    sizes = {"hidden": (S, T, D), "weight": (V, D), "bias": (V,), "low": (S, T, R), "up": (V, R)}
    return {name: torch.randn(size, dtype=dtype).requires_grad_() for name, size in sizes.items()}


def labels() -> Tensor:
    torch.manual_seed(4)
    labels = torch.randint(0, V, (S, T))
    labels[:, 0], labels[3], labels[0, 4:] = -100, -100, -100
    return labels


def expected(given: dict[str, Tensor], weights: Tensor, normalizer: float | None, softcap: float | None) -> Tensor:
    z = given["hidden"] @ given["weight"].T + given["low"] @ given["up"].T + given["bias"]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    counts = labels() != -100
    logp = z.log_softmax(-1).gather(-1, labels().clamp(min=0)[..., None])[..., 0] * counts
    return -(weights * logp.sum(1)).sum() / (counts.sum() if normalizer is None else normalizer)


CASES = {
    "mean over tokens": {},
    "weighted": {"seq_weight": SEQ_WEIGHT},
    "normalizer": {"normalizer": 7.0, "seq_weight": SEQ_WEIGHT.float()},
    "softcap": {"softcap": 3.0},
    "filter": {"grad_filter": 1e-30},
    "lengths": {"lengths": (labels() != -100).sum(1)},
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rows", [None, 6, 1])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(name, rows, packed):
    options, given = CASES[name], tensors()
    hidden, low, y = given["hidden"], given["low"], labels()
    bounds = torch.arange(0, S * T + 1, T) if packed else None
    if packed:
        hidden, low, y = hidden.flatten(0, 1), low.flatten(0, 1), y.flatten()
    out = linear_nll_loss(
        hidden,
        given["weight"],
        y,
        bias=given["bias"],
        adapter=(low, given["up"]),
        cu_seqlens=bounds,
        budget_bytes=None if rows is None else budget_of(rows, V, D + R, torch.float64),
        **options,
    )
    truth = tensors()
    weights = options.get("seq_weight", torch.ones(S)).double()
    exact = expected(truth, weights, options.get("normalizer"), options.get("softcap"))
    torch.testing.assert_close(out.loss, exact, rtol=1e-12, atol=0)
    assert out.logp.shape == (S,) and not out.logp.requires_grad
    (1.7 * out.loss).backward()
    (1.7 * exact).backward()
    for key in given:
        torch.testing.assert_close(given[key].grad, truth[key].grad, rtol=1e-10, atol=1e-13, msg=key)


def products(rows: int | None, wanted: tuple[str, ...], backend: str, device: torch.device) -> float:
    """Flops of a step, in products of the 16 rows that count."""
    vocabulary, width = 64, 8
    hidden = torch.randn(2, 11, width, device=device, requires_grad="hidden" in wanted)
    weight = torch.randn(vocabulary, width, device=device, requires_grad="weight" in wanted)
    y = torch.randint(0, vocabulary, (2, 11), device=device)
    y[:, :3] = -100
    budget = None if rows is None else budget_of(rows, vocabulary, width, torch.float32)

    def step() -> None:
        loss = linear_nll_loss(hidden, weight, y, budget_bytes=budget, backend=backend).loss
        if wanted:
            loss.backward()

    return product_flops(step) / (2 * 16 * vocabulary * width)


@pytest.mark.parametrize("rows", [None, 7, 1])
def test_a_step_computes_no_row_twice_at_any_budget(rows, backend, device):
    assert products(rows, ("hidden", "weight"), backend, device) == 3
    assert products(rows, ("hidden",), backend, device) == 2
    assert products(rows, (), backend, device) == 1


@pytest.mark.parametrize(
    "seq_weight", [torch.ones(4), torch.ones(S, dtype=torch.int64), torch.ones(S).requires_grad_()]
)
def test_weights_that_are_none_are_named(seq_weight):
    given = tensors(torch.float32)
    with pytest.raises(ValueError, match="seq_weight"):
        linear_nll_loss(given["hidden"], given["weight"], labels(), seq_weight=seq_weight)
