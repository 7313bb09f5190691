"""The package's own matrix product: every form in which a head asks for one, at every instruction set."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import oracle
import pytest
import torch
from cases import DTYPES
from cost import own_products
from native_rows import TAG, Guarded, _cpu, each_level

from wrpo_kernels import linear_preference_loss
from wrpo_kernels.lm_head import products

# Below, at and above a tile, a panel, a block of rows and a depth that is taken at once.
SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (8, 48, 16),
    (9, 49, 17),
    (100, 70, 33),
    (64, 1000, 64),
    (33, 40, 1300),
    (700, 25, 129),
    (5, 2500, 3),
    (20, 3500, 1300),  # several blocks of columns, several pieces of depth
]
NOTHING = torch.zeros(())
FORMS = {"rows": (True, True), "logits": (True, False), "grad_weight": (False, True), "columns": (False, False)}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def widest_level():
    yield
    _cpu.set_simd(_cpu.features()["simd_available"][-1])


def laid_out(values, has_rows_together):
    """The same values in a larger storage: the elements of a row side by side, or those of a column."""
    return Guarded(values).rows if has_rows_together else Guarded(values.t()).rows.t()


def multiply(out, left, right, beta=0.0, threads=1):
    _cpu.product(
        *(left.data_ptr(), TAG[left.dtype], *left.stride(), right.data_ptr(), TAG[right.dtype], *right.stride()),
        *(out.data_ptr(), out.stride(0), *out.shape, left.shape[1], beta, threads),
    )
    return out


def assert_right(got, left, right, beta=0.0, before=NOTHING):
    """Within what a dot product in float32 may lose."""
    exact = left.double() @ right.double() + beta * before
    sizes = left.double().abs() @ right.double().abs() + beta * before.abs()
    oracle.assert_rule("product", got, exact, exact, oracle.DOT_ULPS * torch.finfo(torch.float32).eps * sizes)


@each_form
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_of_any_shape_and_form_is_right_and_writes_nothing_else(size, form):
    m, n, k = size
    left, right = laid_out(torch.randn(m, k), form[0]), laid_out(torch.randn(k, n), form[1])
    before = torch.randn(m, n)
    for _, beta in itertools.product(each_level(), (0.0, 1.0, 0.25)):
        out = Guarded(before if beta else torch.full((m, n), torch.nan))
        multiply(out.rows, left, right, beta)
        assert_right(out.rows, left, right, beta, before.double())
        out.assert_untouched_around()


@each_form
@pytest.mark.parametrize("types", [pair for pair in itertools.product(DTYPES, DTYPES) if pair != (torch.float32,) * 2])
def test_16_bit_operands_are_widened_and_summed_in_float32(types, form):
    for (m, n, k), _ in itertools.product([(9, 50, 70), (101, 70, 700)], each_level()):
        left = laid_out(torch.randn(m, k).to(types[0]), form[0])
        right = laid_out(torch.randn(k, n).to(types[1]), form[1])
        assert_right(multiply(torch.empty(m, n), left, right), left, right)


def test_a_sum_as_long_as_a_vocabulary_errs_by_a_few_ulps():
    """All terms of one sign: 1.3 ulps in the mean of squares, torch's product 2.1, one running sum 26."""
    left, right = torch.rand(16, 49152), torch.rand(49152, 96)
    exact = left.double() @ right.double()
    for _ in each_level():
        error = (multiply(torch.empty(16, 96), left, right).double() - exact) / exact
        assert error.square().mean().sqrt() < 3 * torch.finfo(torch.float32).eps


def test_a_float16_that_is_subnormal_infinite_or_nan_is_widened_as_it_is():
    left = torch.tensor([[6e-8, 65504.0, -2.0]], dtype=torch.float16)
    right = torch.eye(3)
    for _ in each_level():
        assert torch.equal(multiply(torch.empty(1, 3), left, right), left.float())
    for value in (torch.inf, -torch.inf, torch.nan):
        got = multiply(torch.empty(1, 1), torch.tensor([[value]], dtype=torch.float16), torch.ones(1, 1))
        torch.testing.assert_close(got, torch.tensor([[value]]), equal_nan=True)


@each_form
def test_the_number_of_threads_changes_no_bit(form):
    m, n, k = 300, 301, 700
    left, right = laid_out(torch.randn(m, k), form[0]), laid_out(torch.randn(k, n), form[1])
    for _ in each_level():
        alone = multiply(torch.empty(m, n), left, right)
        for threads in (2, 3, 6, 7):
            assert torch.equal(multiply(torch.empty(m, n), left, right, threads=threads), alone)


@each_form
def test_what_is_not_finite_stays_in_its_row_and_its_column(form):
    m, n, k = 150, 300, 100  # enough for two threads
    left, right = torch.randn(m, k), torch.randn(k, n)
    left[7, 3], right[5, 299] = torch.nan, torch.inf
    left, right = laid_out(left, form[0]), laid_out(right, form[1])
    for _ in each_level():
        finite = multiply(torch.empty(m, n), left, right, threads=2).isfinite()
        expected = torch.ones(m, n, dtype=torch.bool)
        expected[7], expected[:, 299] = False, False
        assert torch.equal(finite, expected)


def test_a_matrix_without_a_unit_stride_and_no_depth_are_refused():
    x = torch.randn(8, 8)
    with pytest.raises(ValueError, match="b: expected a stride that is 1, got 2"):
        multiply(torch.empty(4, 4), x[:4, :4], x[:, ::2][:4])
    with pytest.raises(ValueError, match="a: expected a stride that is 1, got 2"):
        multiply(torch.empty(4, 4), x[:, ::2][:4], x[:4, :4])
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        multiply(torch.empty(4, 4), x[:4, :0], x[:0, :4])


def test_a_product_without_rows_or_columns_writes_nothing():
    x = torch.randn(8, 8)
    assert multiply(torch.empty(0, 4), x[:0, :4], x[:4, :4]).numel() == 0
    assert multiply(torch.empty(4, 0), x[:4, :4], x[:4, :0]).numel() == 0


AMD = {"simd": "avx512", "threads_runtime": "openmp", "is_intel": False}


@pytest.mark.parametrize(
    ("features", "is_own"),
    [
        (AMD, True),
        (AMD | {"simd": "avx2"}, True),
        (AMD | {"simd": "generic"}, False),
        (AMD | {"is_intel": True}, False),
        (AMD | {"threads_runtime": "none"}, False),
        ({"simd": "avx512", "amx_bf16": False}, False),  # a module of an earlier version
        (None, False),  # none was built
    ],
)
def test_our_own_product_runs_where_torch_s_holds_back(features, is_own, monkeypatch):
    module = None if features is None else SimpleNamespace(features=lambda: features)
    monkeypatch.setattr(products, "load_extension", lambda _name: (module, ""))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.prefers_own.__wrapped__() is is_own
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.prefers_own.__wrapped__()


@pytest.mark.parametrize("is_own", [True, False])
def test_a_head_multiplies_by_either_of_both_as_it_is_told(is_own, monkeypatch):
    monkeypatch.setattr(products, "prefers_own", lambda: is_own)
    left, right, total = torch.randn(30, 20), torch.randn(20, 40), torch.randn(30, 40)
    with own_products() as own:
        assert_right(products.product_into(torch.empty(30, 40), left, right), left, right)
        assert_right(products.product_into(total.clone(), left, right, 0.5), left, right, 0.5, total.double())
    assert len(own) == 2 * is_own
    with own_products() as own:  # neither stride is 1; one column, one row; float64
        some, others = left[:, ::2], right[::2, ::2]
        assert_right(products.product_into(torch.empty(30, 20), some, others), some, others)
        assert_right(products.product_into(torch.empty(30, 1), left, right[:, :1]), left, right[:, :1])
        assert_right(products.product_into(torch.empty(1, 40), left[:1], right), left[:1], right)
        products.product_into(torch.empty(30, 40).double(), left.double(), right.double())
    assert not own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"budget_bytes": 1}, {"adapter": True}, {"logits_dtype": torch.float32}], ids=str
)
def test_a_loss_and_its_gradients_are_those_of_torch_s_products(dtype, options, monkeypatch):
    hidden, weight = torch.randn(4, 6, 40).to(dtype), (torch.randn(150, 40) / 6).to(dtype)
    low, up = torch.randn(4, 6, 3).to(dtype), torch.randn(150, 3).to(dtype)
    labels, sequences = torch.randint(0, 150, (4, 6)), torch.tensor([1.0, -1.0, 1.0, -1.0])
    monkeypatch.setattr(products, "multiplies_fast", lambda dtype: dtype.itemsize > 2)

    def run(is_own):
        monkeypatch.setattr(products, "prefers_own", lambda: is_own)
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, low, up)[: 4 if "adapter" in options else 2]]
        rest = options | ({"adapter": tuple(leaves[2:])} if "adapter" in options else {})
        groups = {"seq_weight": sequences, "group": torch.tensor([0, 0, 1, 1])}
        with own_products() as own:
            loss = linear_preference_loss(*leaves[:2], labels, **groups, beta=0.3, **rest).loss
            gradients = torch.autograd.grad(loss, leaves)
        assert bool(own) == is_own
        return [loss.detach(), *gradients]

    for got, expected in zip(run(True), run(False), strict=True):
        size = expected.double().square().mean().sqrt()
        assert (got.double() - expected.double()).square().mean().sqrt() <= 4 * torch.finfo(dtype).eps * size
