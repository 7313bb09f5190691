"""The CPU kernels behind their raw pointers: every dtype at every instruction set, and the memory around them.

What the ops promise is tested in test_<op>.py; here are the corners that only the kernels have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES
from oracle import preference_truth, ulp
from torch import Tensor

_cpu = pytest.importorskip("wrpo_kernels._cpu", reason="the native module was not built")

TAG = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = torch.finfo(torch.float32).eps
IGNORED = -100
LOSS_KINDS = ("sigmoid", "hinge", "ipo")
VOCABULARIES = (1, 2, 31, 4095, 4097, 50257, 65537)  # below, about and far above a vector, a block of 4096; odd tails
SCALE, TEMPERATURE, SOFTCAP = 0.7, 1.3, 5.0
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
options = pytest.mark.parametrize(
    ("has_bias", "softcap"),
    [(False, 0.0), (True, 0.0), (False, SOFTCAP), (True, SOFTCAP)],
    ids=["plain", "bias", "softcap", "bias and softcap"],
)


@pytest.fixture(autouse=True)
def widest_level():
    """Every test starts and ends at the instruction set that the module chose."""
    chosen = _cpu.features()["simd"]
    yield
    _cpu.set_simd(chosen)


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
    lse: Tensor  # [n]
    delta: Tensor  # [n, V]
    size: Tensor  # [n, V] slope * (onehot + p): what cancels in delta
    bend: Tensor  # [n, 1] largest argument of the tanh
    error: (
        Tensor  # [n] 8 half ulps of the largest score, or of 1: bias, scale, cap, tanh, multiplier, z - top, 2^x, sum
    )


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
        out = torch.full((2, len(self.target) + 2), 77.0)
        kernel(*self._front(logits), out[0, 1:].data_ptr(), out[1, 1:].data_ptr(), self.threads)
        assert (out[:, [0, -1]] == 77.0).all(), "the kernel wrote outside logp or lse"
        return out[0, 1:-1], out[1, 1:-1]

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._forward(_cpu.token_logp, self.logits)

    def delta(self) -> tuple[Tensor, Tensor, Tensor]:
        work = Guarded(self.logits)
        logp, lse = self._forward(_cpu.token_logp_delta_, work.rows)
        work.assert_untouched_around()
        return logp, lse, work.rows

    def grad(self, lse: Tensor, grad_logp: Tensor, *, in_place: bool = False) -> Tensor:
        source = Guarded(self.logits)
        out = source if in_place else Guarded(torch.full_like(self.logits, torch.nan))
        back = (lse.data_ptr(), grad_logp.data_ptr(), out.rows.data_ptr(), out.rows.stride(0), self.threads)
        _cpu.token_logp_grad(*self._front(source.rows), *back)
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
        largest = z.where(z.isfinite(), 0.0).abs().amax(-1).clamp(min=1.0)
        size, delta = (slope * (onehot + sign * p) for sign in (1, -1))
        logp, lse, delta = (x.where(counts.view(-1, *[1] * (x.dim() - 1)), 0.0) for x in (logp, lse, delta))
        return Truth(logp, lse, delta, size, bend, 4 * EPS * largest)

    def check(self) -> None:
        """All kernels at all levels against float64: `Truth.error` for a score, relative to onehot + p for delta."""
        for level in each_level():
            self._check(level)

    def _check(self, level: str) -> None:
        truth = self.truth
        logp, lse = self.forward()
        assert_within(f"{level} logp", logp, truth.logp, truth.error)
        assert_within(f"{level} lse", lse, truth.lse, truth.error)
        assert (logp <= 0).logical_or(logp.isnan()).all()

        # Two scores (z_v and lse), 4 roundings of 1 - p and its factors, the slope of the cap: 1 / cosh^2 amplifies a
        # rounding of u by 2u. One rounding to the dtype; p below the normal numbers of float32 may be lost.
        relative = 2 * truth.error[:, None] + (2 + 4 * truth.bend) * EPS
        lost = truth.size * relative + torch.finfo(torch.float32).tiny
        delta_logp, delta_lse, delta = self.delta()
        assert torch.equal(delta_logp, logp)
        assert torch.equal(delta_lse, lse)
        assert_within(f"{level} delta", delta, truth.delta, lost + 0.51 * ulp(truth.delta, self.logits.dtype))

        # The way back starts from lse rounded to float32: half an ulp more in each exponent.
        c = torch.randn(len(self.target))
        expected, lost = c.double()[:, None] * truth.delta, c.abs().double()[:, None] * (lost + truth.size * relative)
        grad = self.grad(lse, c)
        assert_within(f"{level} grad", grad, expected, lost + 0.51 * ulp(expected, self.logits.dtype))
        assert torch.equal(grad, self.grad(lse, c, in_place=True))


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


# token_logp: values


@options
@dtypes
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_kernel_matches_float64(vocabulary, dtype, has_bias, softcap):
    logits, target = problem(dtype, vocabulary)
    bias = torch.randn(vocabulary) if has_bias else None
    Call(logits, target, bias, SCALE, softcap, TEMPERATURE).check()


def ramp(step: float) -> Tensor:
    """`step` more in each stretch of 1000 elements: the maximum keeps moving."""
    return torch.arange(20000).div(1000, rounding_mode="floor") * step + torch.rand(20000)


ROWS = {
    "maximum rises by more than a stale reference may trail": ramp(7.0),
    "maximum rises by less than that": ramp(0.4),
    "maximum falls": ramp(-9.0),
    "one late peak": torch.randn(20000).index_fill(0, torch.tensor([19999]), 60.0),
    "one early peak": torch.randn(20000).index_fill(0, torch.tensor([0]), 60.0),
    "begins with -inf": torch.randn(20000).index_fill(0, torch.arange(100), -torch.inf) - 200,
    "first block all -inf": torch.randn(20000).index_fill(0, torch.arange(4096), -torch.inf) - 1e4,
    "ends with -inf": torch.randn(20000).index_fill(0, torch.arange(12000, 20000), -torch.inf),
    "every second is -inf": torch.randn(20000).index_fill(0, torch.arange(1, 20000, 2), -torch.inf),
    "+-1e4": torch.randn(20000).sign() * 1e4,
    "-1e4": torch.randn(20000) - 1e4,
    "masked by the lowest number": torch.randn(20000).index_fill(0, torch.arange(9000), -6.5e4),
    "equal": torch.full((20000,), -3.25),
}


@dtypes
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_hard_on_a_running_maximum_match_float64(name, dtype):
    logits = ROWS[name].to(dtype)[None].repeat(3, 1)
    best = int(logits[0].argmax())
    Call(logits, torch.tensor([best, 5000, 19998])).check()


def test_float32_logits_masked_by_finfo_min_match_float64():
    logits = torch.randn(2, 9000)
    logits[0, :5000], logits[1, 4000:] = torch.finfo(torch.float32).min, -1e30
    Call(logits, torch.tensor([6000, 10])).check()


@pytest.mark.parametrize("size", [1e7, 1e12, 1e30, 3e38])
def test_scores_beyond_the_digits_of_float32_still_end_in_probabilities(size):
    # A running float32 reference cannot come near such a maximum.
    logits = torch.full((2, 9000), -size)
    logits[0, [3, 5000]], logits[1, 8999] = size, size
    expected = torch.zeros(2, 9000)
    expected[0, [3, 5000]] = torch.tensor([0.5, -0.5])  # two equal maxima; then one, certain
    for _ in each_level():
        logp, _, delta = Call(logits, torch.tensor([3, 8999])).delta()
        assert_within("logp", logp, torch.tensor([0.5, 1.0], dtype=torch.float64).log(), torch.tensor(EPS))
        assert_within("delta", delta, expected.double(), torch.tensor(EPS))


def test_an_impossible_target_has_logp_of_minus_infinity():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    for _ in each_level():
        logp, _, delta = Call(logits, torch.tensor([1])).delta()
        assert logp[0] == -torch.inf
        assert delta[0, 1] == 1.0  # p is exactly 0


@dtypes
def test_nan_and_infinity_stay_in_their_row(dtype):
    logits, target = problem(dtype, 9001, rows=4)
    target[:] = 7
    logits[1, 4500], logits[2] = torch.nan, -torch.inf
    clean = logits[[0, 3]]
    for _ in each_level():
        logp, lse, delta = Call(logits, target).delta()
        expected_logp, expected_lse, expected_delta = Call(clean, target[:2].clone()).delta()
        assert logp[1].isnan()
        assert logp[2].isnan()  # nothing to choose from: no probability exists
        assert delta[1].isnan().all()
        assert torch.equal(logp[[0, 3]], expected_logp)
        assert torch.equal(lse[[0, 3]], expected_lse)
        assert torch.equal(delta[[0, 3]], expected_delta)


def test_a_nan_of_any_payload_is_stored_as_nan():
    # The pattern of all ones is what memory filled with 0xff holds; carelessly rounded to bfloat16 it becomes 0.
    bias = torch.full((6,), -1, dtype=torch.int32).view(torch.float32)
    for dtype, _ in itertools.product(DTYPES, each_level()):
        _, _, delta = Call(torch.zeros(1, 6, dtype=dtype), torch.tensor([5]), bias).delta()
        assert delta.isnan().all()


def test_tanh_is_accurate_around_zero_and_far_from_it():
    # V = 1: lse is the score itself. 6 half ulps: three of tanh, two products, one change of base.
    x = torch.logspace(-8, 2, 4001)[:, None] * torch.tensor([1.0, -1.0])
    x = x.reshape(-1, 1)
    for level in each_level():
        _, lse = Call(x, torch.zeros(len(x), dtype=torch.int64), softcap=SOFTCAP).forward()
        truth = SOFTCAP * torch.tanh(x[:, 0].double() / SOFTCAP)
        assert_within(f"{level} softcap", lse, truth, 3 * EPS * truth.abs())


def test_the_slope_of_the_cap_keeps_its_relative_accuracy_where_the_cap_is_felt():
    # logits (cap * u, 0): delta at 0 is -p * (1 - tanh(u)^2). 8 half ulps beside exp(-2u), which a rounding of u and
    # one of 2u log2 e move by 2u half ulps each; as 1 - tanh^2 the slope would be lost in rounding from u = 8 on.
    u = torch.linspace(0, 20, 2001)
    logits = torch.stack([SOFTCAP * u, torch.zeros_like(u)], 1)
    exact = logits[:, 0].double() / SOFTCAP
    truth = -torch.sigmoid(SOFTCAP * torch.tanh(exact)) / torch.cosh(exact) ** 2
    for level in each_level():
        _, _, delta = Call(logits, torch.ones(len(u), dtype=torch.int64), softcap=SOFTCAP).delta()
        assert_within(f"{level} slope", delta[:, 0], truth, (4 + 2 * exact) * EPS * truth.abs())


def test_small_probabilities_have_a_small_relative_error():
    # logits (0, -d): delta at 1 is -p. 2^x has 3 half ulps, sum and products 3 more; rounding d adds d / 2 ulps.
    d = torch.linspace(0, 80, 4001)
    logits = torch.stack([torch.zeros_like(d), -d], 1)
    truth = -torch.sigmoid(-d.double())
    for level in each_level():
        _, _, delta = Call(logits, torch.zeros(len(d), dtype=torch.int64)).delta()
        assert_within(f"{level} p", delta[:, 1], truth, (3 + d.double()) * EPS * truth.abs())


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` [n] as the kernels store them, in each of 4 positions: delta = -grad_logp where z == lse."""
    logits, target = torch.zeros(len(values), 5, dtype=dtype), torch.full((len(values),), 4)
    return Call(logits, target).grad(torch.zeros(len(values)), -values)[:, :4]


def test_float16_is_read_and_written_like_torch_does_in_every_bit():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    between = torch.cat([every.float() + shift * ulp(every.float(), torch.float16).float() for shift in (0.5, 0.499)])
    values = torch.cat([every.float(), between, torch.tensor([1e6, -1e6, torch.inf, -torch.inf, 1e-9, torch.nan])])
    for level in each_level():
        _, lse = Call(every[:, None], torch.zeros(len(every), dtype=torch.int64)).forward()
        assert_within(f"{level} read", lse, every.double(), EPS * every.double().abs())  # one change of base and back
        got, expected = stored(values, torch.float16), values.to(torch.float16)[:, None].expand(-1, 4)
        assert got[-1].isnan().all()
        assert torch.equal(got[:-1], expected[:-1]), level


def test_bfloat16_is_rounded_to_nearest_up_to_subnormals():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
    usual = every[(every.abs() < 2.0**110) & (every.abs() >= 2.0**-125)]
    shifts = (0.0, 0.25, 0.4999, 0.5, 0.5001, 0.75)
    values = torch.cat([usual + shift * ulp(usual, torch.bfloat16).float() for shift in shifts])
    tiny = every[(every.abs() < 2.0**-125)] * 1.004
    for level in each_level():
        half = (values.to(torch.bfloat16).double() - values.double()).abs()[:, None]
        assert_within(f"{level} rounded", stored(values, torch.bfloat16), values.double()[:, None], half)
        assert_within(f"{level} tiny", stored(tiny, torch.bfloat16), tiny.double()[:, None], torch.tensor(2.0**-133))


# token_logp: the contract of the pointers


@dtypes
def test_ignored_rows_are_zero_whatever_they_hold(dtype):
    logits, target = problem(dtype, 4097)
    logits[2] = torch.nan  # the ignored one
    for _ in each_level():
        logp, lse, delta = Call(logits, target).delta()
        grad = Call(logits, target).grad(lse, torch.ones(3))
        assert logp[2] == lse[2] == 0
        assert not delta[2].any()
        assert not grad[2].any()


@pytest.mark.parametrize("wrong", [-1, 31, 1 << 40, -(1 << 40)])
def test_a_target_outside_the_vocabulary_raises_before_anything_is_written(wrong):
    logits, target = problem(torch.float32, 31)
    target[1] = wrong
    out, untouched = torch.full((2, 3), 77.0), logits.clone()
    layout = (logits.data_ptr(), 0, 3, 31, logits.stride(0), target.data_ptr(), IGNORED, 0, 1.0, 0.0, 1.0)
    for kernel in (_cpu.token_logp, _cpu.token_logp_delta_):
        with pytest.raises(ValueError, match=rf"target\[1\].*31.*got {wrong}"):
            kernel(*layout, out[0].data_ptr(), out[1].data_ptr(), 2)
    with pytest.raises(ValueError, match=r"target\[1\]"):
        _cpu.token_logp_grad(*layout, out[0].data_ptr(), out[1].data_ptr(), logits.data_ptr(), 31, 2)
    assert (out == 77.0).all()
    assert torch.equal(logits, untouched)


def test_no_rows_return_at_once_without_any_pointer():
    _cpu.token_logp(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 1)
    _cpu.token_logp_delta_(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 1)
    _cpu.token_logp_grad(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 0, 31, 1)


@pytest.mark.parametrize(
    ("position", "value", "word"), [(0, 0, "logits"), (1, 3, "dtype"), (3, 0, "V"), (-1, 0, "threads")]
)
def test_an_argument_that_makes_no_sense_is_named(position, value, word):
    x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    arguments = [x.data_ptr(), 0, 1, 2, 2, y.data_ptr(), IGNORED, 0, 1.0, 0.0, 1.0, x.data_ptr(), x.data_ptr(), 1]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"^{word}: expected .* got {value}"):
        _cpu.token_logp(*arguments)


@options
@dtypes
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(dtype, has_bias, softcap):
    logits, target = problem(dtype, 5003, rows=7)
    bias, c = torch.randn(5003) if has_bias else None, torch.randn(7)
    for level in each_level():
        results = []
        for threads in (1, 1, 2, 3, 11):  # 11: more threads than rows
            call = Call(logits, target, bias, SCALE, softcap, TEMPERATURE, threads)
            logp, lse, delta = call.delta()
            results.append([bits(x) for x in (logp, lse, delta, call.grad(lse, c))])
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)), level


@options
def test_instruction_sets_agree_to_a_few_ulps(has_bias, softcap):
    logits, target = problem(torch.float32, 50257)
    call = Call(logits, target, torch.randn(50257) if has_bias else None, SCALE, softcap, TEMPERATURE)
    logp, lse, delta = zip(*(call.delta() for _ in each_level()), strict=True)
    for got in (logp, lse):  # the 8 half ulps of `Truth.error` on either side
        assert_within("row", torch.stack(got), got[-1].double(), 2 * call.truth.error)
    apart = 4 * call.truth.error[:, None] + (4 + 8 * call.truth.bend) * EPS
    assert_within("delta", torch.stack(delta), delta[-1].double(), call.truth.size * apart)


# the rest of the module


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (31, 33), (64, 64), (257, 129), (300, 1100)])
def test_a_transpose_moves_every_element_and_nothing_else(rows, columns, itemsize):
    dtype = {2: torch.int16, 4: torch.int32}[itemsize]
    source = Guarded(torch.randint(-(1 << 15), 1 << 15, (rows, columns)).to(dtype)).rows
    for _, threads in itertools.product(each_level(), (1, 3)):
        out = Guarded(torch.zeros(columns, rows, dtype=dtype))
        front = (source.data_ptr(), itemsize, rows, columns, source.stride(0))
        _cpu.transpose(*front, out.rows.data_ptr(), out.rows.stride(0), threads)
        assert torch.equal(out.rows, source.t())
        out.assert_untouched_around()


def test_an_empty_transpose_needs_no_pointer():
    _cpu.transpose(0, 2, 0, 5, 5, 0, 0, 1)
    _cpu.transpose(0, 2, 5, 0, 0, 0, 5, 1)


def test_a_transpose_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="itemsize: expected 2 or 4, got 8"):
        _cpu.transpose(1, 8, 1, 1, 1, 1, 1, 1)


def test_features_say_what_the_machine_and_the_build_have():
    features = _cpu.features()
    assert features["simd"] == features["simd_available"][-1]  # the widest, unless told otherwise
    assert features["simd_available"][0] == "generic"
    assert isinstance(features["amx_bf16"], bool)
    assert features["threads_runtime"] in ("openmp", "none")
    assert features["compiler"]


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"generic.*got avx1024"):
        _cpu.set_simd("avx1024")


# preference_loss


class Preference:
    """6 sequences in 3 groups, out of order; `options` as in the contract of the kernel."""

    def __init__(self, kind: str, logp: Tensor | None = None, **options) -> None:
        self.kind = kind
        self.logp = torch.tensor([-40.0, -35.5, -60.25, -12.0, -90.0, -33.0]) if logp is None else logp
        self.options = {
            "ref_logp": None,
            "seq_weight": torch.tensor([0.1, -1.0, 0.9, 1.0, -1.0, -0.5]),
            "group": torch.tensor([2, 2, 2, 0, 1, 0]),
            "length": None,
            "nll_weight": None,
            "group_weight": None,
            "beta": 0.1,
            "gamma": 0.0,
            "label_smoothing": 0.0,
            "length_normalize": False,
        } | options

    def run(self) -> dict[str, Tensor]:
        sizes = {"loss": 3, "reward": len(self.logp), "margin": 3, "coef": len(self.logp)}
        return self._into(sizes, _cpu.preference_loss, self.logp.data_ptr())

    def run_of_rows(self, rows: Tensor, divisor: float) -> dict[str, Tensor]:
        """From rows [N], `options["length"]` of them a sequence; `coef` is that of the rows."""
        sizes = {
            "total": 1,
            "loss": 3,
            "logp": len(self.logp),
            "reward": len(self.logp),
            "margin": 3,
            "coef": len(rows),
        }
        return self._into(sizes, _cpu.preference_loss_of_rows, rows.data_ptr(), len(rows), after=(divisor,))

    def _into(self, sizes: dict[str, int], kernel: Callable, *front: int, after: tuple = ()) -> dict[str, Tensor]:
        o = self.options
        tensors = [o[name] for name in ("ref_logp", "seq_weight", "group", "length", "nll_weight", "group_weight")]
        out = {name: torch.full((size + 2,), 77.0) for name, size in sizes.items()}
        kernel(
            *front,
            *(0 if x is None else x.data_ptr() for x in tensors),
            len(self.logp),
            3,
            o["beta"],
            o["gamma"],
            LOSS_KINDS.index(self.kind),
            o["label_smoothing"],
            o["length_normalize"],
            *after,
            *(x[1:].data_ptr() for x in out.values()),
        )
        assert all((x[[0, -1]] == 77.0).all() for x in out.values()), "the kernel wrote outside its results"
        return {name: x[1:-1] for name, x in out.items()}

    def check(self) -> None:
        """Sums run in double, so a result is the truth rounded once to float32: half an ulp, and a hair."""
        o, logp = self.options, self.logp.double().requires_grad_()
        nll = 0.0 if o["nll_weight"] is None else o["nll_weight"]
        truth = preference_truth(logp, **(o | {"nll_weight": nll}), num_groups=3, loss_type=self.kind)
        (coef,) = torch.autograd.grad(truth.loss.sum(), logp)
        for name, got in self.run().items():
            expected = {**truth._asdict(), "coef": coef}[name].detach()
            assert_within(name, got, expected, 0.5001 * ulp(expected, torch.float32))


PREFERENCES = {
    "plain": {},
    "reference": {"ref_logp": torch.tensor([-41.0, -35.0, -60.0, -15.0, -80.0, -33.5])},
    "margin": {"gamma": 0.7},
    "label smoothing": {"label_smoothing": 0.2},
    "mean over tokens": {"length": torch.tensor([10, 3, 7, 1, 9, 4]), "length_normalize": True, "beta": 2.5},
    "log-likelihood term": {"nll_weight": torch.tensor([0.1, 0.0, 0.2, 0.0, 0.3, 0.0])},
    "weighted groups": {"group_weight": torch.tensor([0.5, 2.0, 0.0])},
    "some weights 0": {"seq_weight": torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0, -0.5])},
    "an empty group": {"group": torch.tensor([2, 2, 2, 0, 2, 0])},
    "steep": {"beta": 3.0},
}


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_loss_matches_float64(name, kind):
    Preference(kind, **PREFERENCES[name]).check()


@pytest.mark.parametrize("margin", [1e4, 40.0, 1.0, 0.0, -40.0, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_sigmoid_loss_is_exact_far_from_zero(margin, label_smoothing):
    logp = torch.tensor([margin, 0.0, 0.0, 0.0, 0.0, 0.0])
    one = {"seq_weight": torch.ones(6), "group": torch.arange(6) % 3, "beta": 1.0}
    Preference("sigmoid", logp, label_smoothing=label_smoothing, **one).check()


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("worst", [-torch.inf, torch.nan])
def test_a_group_of_weight_zero_keeps_no_trace_of_its_margin(kind, worst):
    ref_logp, nll_weight = torch.zeros(6), torch.full((6,), 0.5)
    ref_logp[4] = worst  # the only sequence of group 1
    call = {"ref_logp": ref_logp, "group_weight": torch.tensor([1.0, 0.0, 1.0])}
    got = Preference(kind, **call).run()
    assert got["loss"][1] == got["coef"][4] == 0.0
    assert all(got[name].isfinite().all() for name in ("loss", "coef"))
    got = Preference(kind, **call, nll_weight=nll_weight).run()
    assert got["loss"][1] == 45.0  # 0.5 * 90: its log-likelihood term stays
    assert got["coef"][4] == -0.5


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_a_sequence_of_weight_zero_cannot_spoil_its_group(kind):
    spoilt = Preference(kind).options["seq_weight"].clone()
    spoilt[0] = 0.0
    ref_logp = torch.zeros(6)
    clean = Preference(kind, seq_weight=spoilt, ref_logp=ref_logp).run()
    ref_logp = ref_logp.index_fill(0, torch.tensor([0]), -torch.inf)
    got = Preference(kind, seq_weight=spoilt, ref_logp=ref_logp).run()
    assert all(torch.equal(got[name], clean[name]) for name in ("loss", "margin", "coef"))


def test_an_empty_sequence_has_no_reward_and_no_coefficient_under_length_normalisation():
    logp, length = torch.tensor([0.0, -35.5, -60.25, -12.0, -90.0, -33.0]), torch.tensor([0, 3, 7, 1, 9, 4])
    got = Preference("sigmoid", logp, length=length, length_normalize=True, nll_weight=torch.ones(6)).run()
    assert got["reward"][0] == got["coef"][0] == 0.0
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_group_that_does_not_exist_is_refused(wrong):
    group = torch.tensor([2, 2, 2, 0, wrong, 0])
    with pytest.raises(ValueError, match=rf"group\[4\].*G = 3.*got {wrong}"):
        Preference("sigmoid", group=group).run()


# sequences and their rows

LENGTHS = torch.tensor([3, 0, 1, 70000, 2, 5])


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_rows_give_the_losses_of_their_sums_and_take_the_coefficients_of_their_sequences(kind):
    rows = -0.001 * torch.rand(int(LENGTHS.sum()))
    got = Preference(kind, length=LENGTHS).run_of_rows(rows, 3.0)
    truth = torch.stack([part.double().sum() for part in rows.split(LENGTHS.tolist())])
    assert_within("sum", got["logp"], truth, 0.5001 * ulp(truth, torch.float32))  # summed in double, rounded once
    expected = Preference(kind, got["logp"], length=LENGTHS).run()
    assert all(torch.equal(got[name], expected[name]) for name in ("loss", "reward", "margin"))
    assert torch.equal(got["coef"], (expected["coef"] / 3).repeat_interleave(LENGTHS))
    assert torch.equal(got["total"][0], expected["loss"].double().sum().float() / 3)


@pytest.mark.parametrize(
    ("length", "message"), [([3, -1, 3, 0, 0, 0], "length: .* got -1"), ([3, 0, 3, 0, 0, 0], "length: .* got 6")]
)
def test_lengths_that_do_not_add_up_to_the_rows_are_refused(length, message):
    with pytest.raises(ValueError, match=message):
        Preference("sigmoid", length=torch.tensor(length)).run_of_rows(torch.zeros(5), 1.0)


def test_rows_without_a_length_are_refused():
    with pytest.raises(ValueError, match="length: expected a pointer"):
        Preference("sigmoid").run_of_rows(torch.zeros(5), 1.0)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.t(), lambda x: x[:, 3:8], lambda x: x[::2], lambda x: x[:0]])
def test_labels_are_counted_by_sequence_whatever_their_strides(view):
    labels = view(torch.randint(-101, -98, (9, 11)))
    counts = torch.full((labels.shape[0] + 2,), 77)
    _cpu.count_labels(labels.data_ptr(), *labels.shape, *labels.stride(), IGNORED, counts[1:].data_ptr())
    assert torch.equal(counts[1:-1], (labels != IGNORED).sum(1))
    assert counts[0] == counts[-1] == 77


def test_sequences_without_a_position_have_no_label_to_count():
    counts = torch.full((2,), 77)
    _cpu.count_labels(0, 2, 0, 0, 1, IGNORED, counts.data_ptr())
    assert counts.tolist() == [0, 0]
    with pytest.raises(ValueError, match="labels: expected a pointer"):
        _cpu.count_labels(0, 2, 1, 1, 1, IGNORED, counts.data_ptr())
