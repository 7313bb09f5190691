"""The Triton kernels that gather, scale and scatter rows, and scale totals, beside float64."""

from __future__ import annotations

import interpreter
import pytest
import torch
from torch import Tensor

from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.lm_head import scaling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU; without one the CPU, where the interpreter plays the kernels."""
    if reason := triton_backend.missing():
        pytest.skip(reason)
    if request.param == "cpu":
        from wrpo_kernels.lm_head import scaling_kernel

        interpreter.compute_like_a_gpu()
        monkeypatch.setattr(scaling, "kernels", lambda tensor: scaling_kernel)
    torch.manual_seed(0)
    return torch.device(request.param)


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Half an ulp, as of one rounding; the float32 product before it may move a tie."""
    facts = torch.finfo(got.dtype)
    half, of_tiny = facts.eps / 2 * 1.01, facts.eps / 2 * facts.smallest_normal
    assert ((got.double() - exact).abs() <= half * exact.abs() + of_tiny).all()


@pytest.mark.parametrize("number", [1, 40, 4096, 9001])
def test_labels_that_count_are_found_in_their_order_whatever_count_is_told(number, device):
    labels = torch.randint(0, 1000, (number,), device=device)
    labels[torch.rand(number, device=device) < 0.3] = -100
    places = (labels != -100).nonzero()[:, 0]
    for size in {len(places), max(len(places) - 1, 0), min(len(places) + 3, number), number}:
        index, kept = scaling.compacted(labels, -100, size, torch.empty(1, device=device))
        expected = torch.cat([places, places.new_zeros(number)])[:size]
        assert torch.equal(index, expected) and torch.equal(kept, labels[expected])


@pytest.mark.parametrize("width", [8, 576, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_gathered_scaled_and_rounded_once(dtype, width, device):
    source, coef = torch.randn(6, 5, width, device=device).to(dtype), torch.randn(4, 1, device=device)
    index = torch.tensor([3, 0, 22, 3], device=device)
    for rows in (source.flatten(0, 1), source[:, :, : width - 3].flatten(0, 1), source[:, :-1], source[::2]):
        flat, at = rows.reshape(-1, rows.shape[-1]), index % rows.shape[:-1].numel()
        assert torch.equal(scaling.gathered(rows, at), flat[at])
        assert_rounded_once(scaling.gathered(rows, at, coef), flat[at].double() * coef.double())
    every = torch.randn(30, 1, device=device)
    assert_rounded_once(scaling.gathered(source, None, every), source.flatten(0, 1).double() * every.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_scaled_and_scattered(dtype, device):
    share, coef = torch.randn(4, 1100, device=device).to(dtype), torch.randn(4, 1, device=device)
    exact, out = share.double() * coef.double(), torch.full((9, 1100), 7.0, device=device).to(dtype)
    index = torch.tensor([8, 0, 3, 2], device=device)
    scaling.put_scaled_(out, index, share.clone(), coef)
    assert_rounded_once(out[index], exact)
    assert (out[[1, 4, 5, 6, 7]] == 7).all()
    scaling.put_scaled_(share, None, share, coef)
    assert_rounded_once(share, exact)


@pytest.mark.parametrize("factor", [1.0, -0.37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_total_is_scaled_and_rounded(dtype, factor, device):
    total, by = torch.randn(37, 301, device=device), torch.tensor(factor, device=device)
    assert_rounded_once(scaling.scaled(total, by, dtype), total.double() * by.double())
    own = total.to(dtype)
    exact = own.double() * by.double()
    result = scaling.scaled_in_place(own, by)
    assert result is own
    assert_rounded_once(own, exact)


def test_an_empty_total_and_no_rows_launch_nothing(device):
    nothing = torch.empty(0, 8, device=device)
    assert (
        scaling.gathered(torch.randn(3, 8, device=device), torch.empty(0, dtype=torch.int64, device=device)).numel()
        == 0
    )
    scaling.put_scaled_(torch.randn(3, 8, device=device), nothing[:, 0].long(), nothing, nothing[:, :1])
    assert scaling.scaled(nothing, torch.ones((), device=device), torch.bfloat16).shape == (0, 8)
