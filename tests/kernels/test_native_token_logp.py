"""The CPU kernels of `token_logp`: every dtype at every instruction set, and the memory around them.

What the op promises is tested in test_token_logp.py; here are the corners that only the kernels have.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES
from native_rows import (
    EPS,
    IGNORED,
    SCALE,
    SOFTCAP,
    TEMPERATURE,
    VOCABULARIES,
    Call,
    _cpu,
    assert_within,
    bits,
    dtypes,
    each_level,
    options,
    problem,
)
from oracle import ulp
from torch import Tensor


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


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_equal_scores_that_only_doubles_hold_are_equally_probable(value):
    for _ in each_level():
        logp, _, delta = Call(torch.full((2, 4), value), torch.tensor([0, 3])).delta()
        assert_within("logp", logp, torch.full((2,), 0.25, dtype=torch.float64).log(), torch.tensor(EPS))
        exact = torch.eye(4, dtype=torch.float64)[[0, 3]] - 0.25
        assert_within("delta", delta, exact, torch.tensor(EPS))


@dtypes
def test_a_label_masked_by_the_lowest_number_has_its_finite_logp(dtype):
    lowest = torch.finfo(dtype).min  # of float32 and bfloat16 beyond float32 in the unit of log 2
    logits = torch.tensor([[lowest, 0, 1], [lowest, lowest, 0], [lowest * 0.7, 0, 1]])
    Call(logits.to(dtype), torch.zeros(3, dtype=torch.int64)).check()


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
        assert torch.equal(lse[:, [0, 3]], expected_lse)
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
        assert_within(f"{level} softcap", lse.sum(0), truth, 3 * EPS * truth.abs())


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
    nothing = torch.zeros(2, len(values))
    return Call(logits, target).grad(nothing[0], nothing, -values)[:, :4]


def test_float16_is_read_and_written_like_torch_does_in_every_bit():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    between = torch.cat([every.float() + shift * ulp(every.float(), torch.float16).float() for shift in (0.5, 0.499)])
    values = torch.cat([every.float(), between, torch.tensor([1e6, -1e6, torch.inf, -torch.inf, 1e-9, torch.nan])])
    for level in each_level():
        _, lse = Call(every[:, None], torch.zeros(len(every), dtype=torch.int64)).forward()
        # One change of base and back.
        assert_within(f"{level} read", lse.sum(0), every.double(), EPS * every.double().abs())
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


@dtypes
def test_ignored_rows_are_zero_whatever_they_hold(dtype):
    logits, target = problem(dtype, 4097)
    logits[2] = torch.nan  # the ignored one
    for _ in each_level():
        logp, lse, delta = Call(logits, target).delta()
        grad = Call(logits, target).grad(logp, lse, torch.ones(3))
        assert logp[2] == 0 and not lse[:, 2].any()
        assert not delta[2].any()
        assert not grad[2].any()


@pytest.mark.parametrize("wrong", [-1, 31, 1 << 40, -(1 << 40)])
def test_a_target_outside_the_vocabulary_raises_before_anything_is_written(wrong):
    logits, target = problem(torch.float32, 31)
    target[1] = wrong
    out, untouched = torch.full((3, 3), 77.0), logits.clone()
    layout = (logits.data_ptr(), 0, 3, 31, logits.stride(0), target.data_ptr(), IGNORED, 0, 1.0, 0.0, 1.0)
    for kernel in (_cpu.token_logp, _cpu.token_logp_delta_):
        with pytest.raises(ValueError, match=rf"target\[1\].*31.*got {wrong}"):
            kernel(*layout, out[0].data_ptr(), out[1].data_ptr(), 2)
    with pytest.raises(ValueError, match=r"target\[1\]"):
        _cpu.token_logp_grad(*layout, *[row.data_ptr() for row in out], logits.data_ptr(), 31, 2)
    assert (out == 77.0).all()
    assert torch.equal(logits, untouched)


def test_no_rows_return_at_once_without_any_pointer():
    _cpu.token_logp(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 1)
    _cpu.token_logp_delta_(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 1)
    _cpu.token_logp_grad(0, 0, 0, 31, 31, 0, IGNORED, 0, 1.0, 0.0, 1.0, 0, 0, 0, 0, 31, 1)


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
            results.append([bits(x) for x in (logp, lse, delta, call.grad(logp, lse, c))])
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)), level


@options
def test_instruction_sets_agree_to_a_few_ulps(has_bias, softcap):
    logits, target = problem(torch.float32, 50257)
    call = Call(logits, target, torch.randn(50257) if has_bias else None, SCALE, softcap, TEMPERATURE)
    logp, lse, delta = zip(*(call.delta() for _ in each_level()), strict=True)
    for got in (logp, [halves.sum(0) for halves in lse]):  # the 8 half ulps of `Truth.error` on either side
        assert_within("row", torch.stack(got), got[-1].double(), 2 * call.truth.lse_error)
    apart = 4 * call.truth.error[:, None] + (4 + 8 * call.truth.bend) * EPS
    assert_within("delta", torch.stack(delta), delta[-1].double(), call.truth.size * apart)
