"""The CPU kernels of `token_logp` behind their raw pointers: one problem, the kernels on it, and the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES
from oracle import ulp
from torch import Tensor

_cpu = pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built")

TAG = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = torch.finfo(torch.float32).eps
IGNORED = -100
VOCABULARIES = (1, 2, 31, 4095, 4097, 50257, 65537)  # below, about and far above a vector, a block of 4096; odd tails
SCALE, TEMPERATURE, SOFTCAP = 0.7, 1.3, 5.0
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
options = pytest.mark.parametrize(
    ("has_bias", "softcap"),
    [(False, 0.0), (True, 0.0), (False, SOFTCAP), (True, SOFTCAP)],
    ids=["plain", "bias", "softcap", "bias and softcap"],
)


def each_level() -> Iterator[str]:
    for level in _cpu.features()["simd_available"]:
        _cpu.set_simd(level)
        yield level


class Guarded:
    """Rows [n, V] inside a larger storage of sentinels: a stride beyond V, and no row on a vector boundary."""

    GAP, BEFORE = 7, 3

    def __init__(self, values: Tensor) -> None:
        rows, columns = values.shape
        stride = columns + self.GAP
        self.storage = torch.full((self.BEFORE + rows * stride,), 77.0, dtype=values.dtype)
        self.rows = self.storage[self.BEFORE :].view(rows, stride)[:, :columns]
        self.rows.copy_(values)

    def assert_untouched_around(self) -> None:
        around = torch.ones(self.storage.shape, dtype=torch.bool)
        around[self.BEFORE :].view(len(self.rows), -1)[:, : self.rows.shape[1]] = False
        assert (self.storage[around] == 77.0).all(), "the kernel wrote outside its rows"


class Truth(NamedTuple):
    """float64; ignored rows 0."""

    logp: Tensor  # [n]
    lse: Tensor  # [n], what the two halves [2, n] add up to
    delta: Tensor  # [n, V]
    size: Tensor  # [n, V] slope * (onehot + p): what cancels in delta
    bend: Tensor  # [n, 1] largest argument of the tanh
    # [n] 8 half ulps of the largest score where anything is done to it, else of the largest difference of two, or of
    # log V, and of 1 at least: bias, scale, cap, tanh, multiplier, z - top, 2^x, sum.
    error: Tensor
    lse_error: Tensor  # [n] 8 half ulps of the largest score: that of the multiplier is relative to it


class Call:
    """One problem and the four kernels on it."""

    def __init__(self, logits: Tensor, target: Tensor, bias=None, scale=1.0, softcap=0.0, temperature=1.0, threads=1):
        self.logits, self.target, self.bias, self.threads = logits, target, bias, threads
        self.transform = (scale, softcap, 1.0 / temperature)

    def _front(self, logits: Tensor) -> tuple:
        n, vocabulary = logits.shape
        layout = (logits.data_ptr(), TAG[logits.dtype], n, vocabulary, logits.stride(0))
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return (*layout, self.target.data_ptr(), IGNORED, bias, *self.transform)

    def _forward(self, kernel: Callable, logits: Tensor) -> tuple[Tensor, Tensor]:
        n = len(self.target)
        logp, lse = torch.full((n + 2,), 77.0), torch.full((2 * n + 2,), 77.0)
        kernel(*self._front(logits), logp[1:].data_ptr(), lse[1:].data_ptr(), self.threads)
        assert all(out[end] == 77.0 for out in (logp, lse) for end in (0, -1)), "the kernel wrote outside logp or lse"
        return logp[1:-1], lse[1:-1].view(2, n)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._forward(_cpu.token_logp, self.logits)

    def delta(self) -> tuple[Tensor, Tensor, Tensor]:
        work = Guarded(self.logits)
        logp, lse = self._forward(_cpu.token_logp_delta_, work.rows)
        work.assert_untouched_around()
        return logp, lse, work.rows

    def grad(self, logp: Tensor, lse: Tensor, grad_logp: Tensor, *, in_place: bool = False) -> Tensor:
        source = Guarded(self.logits)
        out = source if in_place else Guarded(torch.full_like(self.logits, torch.nan))
        back = [x.data_ptr() for x in (logp, lse, grad_logp, out.rows)]
        _cpu.token_logp_grad(*self._front(source.rows), *back, out.rows.stride(0), self.threads)
        out.assert_untouched_around()
        return out.rows

    @cached_property
    def truth(self) -> Truth:
        scale, softcap, inverse = self.transform
        x = self.logits.double() + (0.0 if self.bias is None else self.bias.double())
        z, slope, bend = scale * x, torch.full_like(x, scale * inverse), torch.zeros(())
        if softcap:
            bend = (z / softcap).abs().amax(-1, keepdim=True).clamp(max=50.0)
            slope = slope / torch.cosh(z / softcap) ** 2
            z = softcap * torch.tanh(z / softcap)
        z = z * inverse
        counts, index = self.target != IGNORED, self.target.clamp(min=0)[:, None]
        lse, onehot = torch.logsumexp(z, -1), torch.zeros_like(z).scatter_(1, index, 1.0)
        p = torch.exp(z - lse[:, None])
        logp = z.gather(1, index)[:, 0] - lse
        finite = z.where(z.isfinite(), 0.0)
        largest, changed = finite.abs().amax(-1).clamp(min=1.0), self.bias is not None or softcap
        felt = largest if changed else (finite.amax(-1) - finite.amin(-1)).clamp(min=max(1.0, math.log(x.shape[1])))
        size, delta = (slope * (onehot + sign * p) for sign in (1, -1))
        logp, lse, delta = (x.where(counts.view(-1, *[1] * (x.dim() - 1)), 0.0) for x in (logp, lse, delta))
        return Truth(logp, lse, delta, size, bend, 4 * EPS * felt, 4 * EPS * largest)

    def check(self) -> None:
        """All kernels at all levels against float64: `Truth.error` for a score, relative to onehot + p for delta."""
        for level in each_level():
            self._check(level)

    def _check(self, level: str) -> None:
        truth = self.truth
        logp, lse = self.forward()
        assert_within(f"{level} logp", logp, truth.logp, truth.error)
        assert_within(f"{level} lse", lse.double().sum(0), truth.lse, truth.lse_error)
        assert (logp <= 0).logical_or(logp.isnan()).all()

        # Two scores (z_v and lse), 4 roundings of 1 - p and its factors, the slope of the cap: 1 / cosh^2 amplifies a
        # rounding of u by 2u. One rounding to the dtype; p below the normal numbers of float32 may be lost.
        relative = 2 * truth.error[:, None] + (2 + 4 * truth.bend) * EPS
        lost = truth.size * relative + torch.finfo(torch.float32).tiny
        delta_logp, delta_lse, delta = self.delta()
        assert torch.equal(delta_logp, logp)
        assert torch.equal(delta_lse, lse)
        assert_within(f"{level} delta", delta, truth.delta, lost + 0.51 * ulp(truth.delta, self.logits.dtype))

        c = torch.randn(len(self.target))
        expected, lost = c.double()[:, None] * truth.delta, c.abs().double()[:, None] * lost
        grad = self.grad(logp, lse, c)
        assert_within(f"{level} grad", grad, expected, lost + 0.51 * ulp(expected, self.logits.dtype))
        assert torch.equal(grad, self.grad(logp, lse, c, in_place=True))


def assert_within(name: str, got: Tensor, truth: Tensor, allowed: Tensor) -> None:
    error = (got.double() - truth).abs().where(got.double() != truth, 0.0)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name} element {int(worst)}: got {got.flatten()[worst]:.9g}, truth {truth.flatten()[worst]:.9g}, "
        f"error {error.flatten()[worst]:.3g}, allowed {allowed.expand_as(error).flatten()[worst]:.3g}"
    )


def problem(dtype: torch.dtype, vocabulary: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Logits in misaligned rows with a stride beyond V; targets at both ends, every third row ignored."""
    logits = Guarded((3 * torch.randn(rows, vocabulary)).to(dtype)).rows
    return logits, torch.tensor([0, vocabulary - 1, IGNORED] * rows)[:rows]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
