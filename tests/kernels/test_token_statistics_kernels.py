"""The kernels of `linear_token_statistics` on rows of logits: values and gradients beside float64, what they touch."""

from __future__ import annotations

from typing import NamedTuple

import cases
import closed_form
import oracle
import pytest
import torch
from cases import DTYPES, Case
from conftest import HERE, PLAYED
from oracle import Transform
from torch import Tensor

from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.linear_token_statistics import contract
from wrpo_kernels.linear_token_statistics.wanted import COLUMNS, Wanted
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import contract as token_logp

PLACES = (*HERE, PLAYED)
TRAINED = COLUMNS[:-1]
ALL = Wanted(*[True] * 4)
IGNORED = -100


class Found(NamedTuple):
    values: Tensor
    top1: Tensor
    grad: Tensor


def run(
    backend: str, logits: Tensor, target: Tensor, coef: Tensor, transform: Transform, wanted: Wanted = ALL
) -> Found:
    kernel = choose(backend, contract.CANDIDATES, logits)
    told = (target, IGNORED, transform_of(transform), wanted)
    values = torch.empty(len(target), len(COLUMNS), device=logits.device)
    top1 = torch.empty(len(target), dtype=torch.int64, device=logits.device)
    kernel.statistics(logits, *told, values, top1)
    grad = cases.laid_out(logits.clone(), "padded rows") if logits.stride(0) != logits.shape[1] else logits.clone()
    kernel.grad_(grad, *told, values, coef)
    return Found(values, top1, grad)


def transform_of(transform: Transform) -> LogitTransform:
    bias, scale, softcap, temperature = transform
    return LogitTransform(bias, scale, softcap or 0.0, temperature)


def coefficients(target: Tensor) -> Tensor:
    return torch.randn(len(target), len(COLUMNS), device=target.device)


def plain(logits: Tensor, target: Tensor, coef: Tensor, transform: Transform) -> tuple[dict[str, Tensor], Tensor]:
    """What a user of torch writes."""
    x = logits.detach().clone().requires_grad_()
    z = transform(x.float(), None if transform.bias is None else transform.bias.float())
    log_p, counts = z.log_softmax(1), target != IGNORED
    values = {
        "logp": oracle.pick(z, target, IGNORED),
        "lse": z.logsumexp(1),
        "entropy": -(log_p.exp() * log_p).where(log_p > -torch.inf, 0.0).sum(1),
        "mean_logits": z.mean(1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(1),
    }
    values = {name: value.where(counts, 0.0) for name, value in values.items()}
    loss = sum((value * coef[:, COLUMNS.index(name)]).sum() for name, value in values.items())
    return values, torch.autograd.grad(loss, x)[0].nan_to_num()


def check(backend: str, logits: Tensor, target: Tensor, transform: Transform = Transform()) -> None:  # noqa: B008
    coef, device = coefficients(target), logits.device
    if logits.isinf().any():
        coef[:, COLUMNS.index("mean_logits")] = 0.0
    got = run(backend, logits, target, coef, transform)
    named = {name: coef[:, COLUMNS.index(name)].cpu() for name in TRAINED}
    head = transform._asdict() | {"bias": None if transform.bias is None else transform.bias.cpu()}
    given, labels = logits.cpu(), target.cpu()
    true = closed_form.statistics(closed_form.exact(given), labels, labels != IGNORED, head, named, logits.dtype)
    values, grad = plain(logits, target, coef, transform)
    for name, (value, error) in true.values.items():
        found = got.values[:, COLUMNS.index(name)]
        oracle.assert_rule(name, found, value.to(device), values[name], error.to(device))
    oracle.assert_rule("gradient", got.grad, true.delta.value.to(device), grad, true.delta.error.to(device))
    z, error = (getattr(closed_form.scores(closed_form.exact(given), head), name) for name in ("z", "error"))
    counts, top1 = labels != IGNORED, got.top1.cpu()
    chosen = z.gather(1, top1.where(counts, 0)[:, None])
    assert ((chosen >= z.amax(1, keepdim=True) - 2 * error)[:, 0] & (top1 >= 0)).equal(counts)


def rows_of(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    logits, target = cases.logits_of(case, dtype, device)
    return logits.reshape(-1, case.vocabulary), target.reshape(-1)


CASES = {name: cases.SHAPES[name] for name in ("empty", "one token", "two tokens", "just over a block")}
CASES["just over a block"] = CASES["just over a block"]._replace(leading=(3,))
CASES |= {name: cases.LAYOUTS[name] for name in ("padded rows", "misaligned")}
CASES |= {name: cases.VALUES[name]._replace(leading=(4,)) for name in ("peaked", "huge", "all ignored")}
CASES |= {"minus infinity": cases.MINUS_INFINITY}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_value_and_the_gradient_of_a_sum_of_all_keep_the_error_rule(case, dtype, backend, device):
    check(backend, *rows_of(case, dtype, device))


@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_the_transform_of_the_logits_is_part_of_values_and_gradients(name, backend, device):
    logits, target = rows_of(Case("", (3,), 131), torch.bfloat16, device)
    check(backend, logits, target, cases.TRANSFORMS[name](torch.randn(131, device=device)))


def test_a_scale_below_zero_turns_the_order_round(backend, device):
    check(backend, *rows_of(Case("", (5,), 131), torch.float32, device), Transform(logit_scale=-0.7))


@pytest.mark.parametrize("size", [1e7, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_scores_beyond_the_digits_of_float32_the_statistics_are_those_of_their_differences(
    dtype, size, backend, device
):
    """One that dominates leaves an entropy of 0, k equal ones log k."""
    rows = [[1.0, -1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0]]
    logits, target = (size * torch.tensor(rows, device=device)).to(dtype), torch.tensor([0, 3, 1, 2], device=device)
    found = run(backend, logits, target, coefficients(target), Transform()).values
    counts = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    expected = {"logp": -counts.log(), "entropy": counts.log(), "log_sum_sq_probs": -counts.log()}
    for name, value in expected.items():
        torch.testing.assert_close(found[:, COLUMNS.index(name)], value, atol=1e-6, rtol=0)
    check(backend, logits, target)


@pytest.mark.parametrize("vocabulary", [4, 9001])
def test_the_mean_of_logits_masked_by_the_lowest_number_is_finite(vocabulary, backend, device):
    """Their sum is not a float32."""
    if backend in ("triton", "cuda"):
        pytest.skip("sums the scores in float32")
    logits = torch.zeros(1, vocabulary, device=device)
    logits[0, : vocabulary // 2], logits[0, -2] = torch.finfo(torch.float32).min, 1.0
    target = torch.tensor([vocabulary - 1], device=device)
    mean = run(backend, logits, target, coefficients(target), Transform()).values[:, COLUMNS.index("mean_logits")]
    torch.testing.assert_close(mean.double(), logits.double().mean(1), rtol=1e-6, atol=0)


WANTED = {name: Wanted(**{**dict.fromkeys(Wanted._fields, False), name: True}) for name in Wanted._fields}
WANTED["nothing"] = Wanted(*[False] * 4)


@pytest.mark.parametrize("name", WANTED)
def test_what_is_asked_for_has_the_same_bits_whatever_else_is_and_the_rest_is_empty(name, backend, device):
    logits, target = rows_of(Case("", (3,), 2051), torch.bfloat16, device)
    coef = coefficients(target)
    for column in set(Wanted._fields) - {name, "top1"}:
        coef[:, COLUMNS.index(column)] = 0.0
    every, some = (run(backend, logits, target, coef, Transform(), wanted) for wanted in (ALL, WANTED[name]))
    for column in {"logp", "lse", "lse_rest", name} - {"top1", "nothing"}:
        k = COLUMNS.index(column)
        oracle.assert_same_bits(column, some.values[:, k], every.values[:, k])
    torch.testing.assert_close(some.grad, every.grad, rtol=2**-7, atol=1e-7)
    assert name != "top1" or torch.equal(some.top1, every.top1)
    if backend != "native":  # it makes all at once
        for column in {"entropy", "mean_logits", "log_sum_sq_probs"} - {name}:
            assert not some.values[:, COLUMNS.index(column)].any()
        assert name == "top1" or (some.top1 == -1).all()


@pytest.mark.parametrize("vocabulary", [131, 8208])
def test_log_probs_and_their_log_sum_exp_have_the_bits_of_the_other_op(vocabulary, backend, device):
    logits, target = rows_of(Case("", (2,), vocabulary, target="ends"), torch.bfloat16, device)
    got = run(backend, logits, target, coefficients(target), Transform(softcap=9.0)).values
    kernel = choose(backend, token_logp.CANDIDATES, logits)
    logp, lse = torch.empty(2, device=device), torch.empty(2, 2, device=device)
    kernel.forward(logits, target, IGNORED, transform_of(Transform(softcap=9.0)), logp, lse)
    for name, expected in (("logp", logp), ("lse", lse[0]), ("lse_rest", lse[1])):
        oracle.assert_same_bits(name, got[:, COLUMNS.index(name)], expected)


@pytest.mark.parametrize("label", [5, 4098])
def test_the_first_of_equal_scores_is_the_top_one_wherever_they_and_the_label_stand(label, backend, device):
    logits = torch.zeros(3, 4099, device=device)
    for row, equal in enumerate(((4098, 3001, 700), (2049, 5), (0, 4098))):
        logits[row, list(equal)] = 2.0
    target = torch.full((3,), label, device=device)
    got = run(backend, logits, target, coefficients(target), Transform())
    assert got.top1.tolist() == [700, 5, 0]


def test_a_wrong_label_makes_nan_of_its_row_and_of_no_other(backend, device, monkeypatch):
    """Where reading the labels would wait for the device."""
    if backend in ("native", "reference"):
        pytest.skip("reads the labels, and raises")
    if backend == "triton":  # played on a CPU it reads them too
        from wrpo_kernels.linear_token_statistics import triton_kernel

        monkeypatch.setattr(triton_kernel, "check_labels_where_free", lambda *told: None)
    logits, target = rows_of(Case("", (6,), 131, target="ends"), torch.float32, device)
    target[1:5] = torch.tensor([131, -1, 2**40, -(2**62)], device=device)
    got = run(backend, logits, target, coefficients(target), Transform())
    assert got.values[1:5].isnan().all() and got.grad[1:5].isnan().all()
    assert got.values[[0, 5]].isfinite().all() and got.grad[[0, 5]].isfinite().all()
    assert (got.top1 == -1).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("size", [1e7, 1e30])
def test_scores_of_a_run_that_diverges_give_finite_values_and_gradients(size, scale, backend, device):
    """The most likely token is alone there, and the rest has no share."""
    if backend == "native" and size > 1e7:
        pytest.skip("its log-sum-exp in two floats has no digits after the point there")
    logits = (scale * size * torch.linspace(0.5, 1, 4099, device=device)).repeat(3, 1)
    target, coef = torch.tensor([0, 4098, 17], device=device), torch.ones(3, 6, device=device)
    coef[:, [COLUMNS.index("mean_logits"), COLUMNS.index("logp")]] = 0.0
    got = run(backend, logits, target, coef, Transform(logit_scale=scale))
    assert got.top1.tolist() == [4098] * 3
    for name in ("entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(got.values[:, COLUMNS.index(name)], torch.zeros(3, device=device), atol=1e-5, rtol=0)
    expected = torch.zeros_like(logits)
    expected[:, 4098] = scale  # of the log-sum-exp alone
    torch.testing.assert_close(got.grad, expected, rtol=1e-5, atol=1e-5)


def test_nan_in_a_row_stays_in_it(backend, device):
    logits, target = rows_of(Case("", (4,), 131, target="ends"), torch.float32, device)
    coef = coefficients(target)
    clean = run(backend, logits, target, coef, Transform())
    logits[1, 17], logits[2] = torch.nan, torch.nan
    got = run(backend, logits, target, coef, Transform())
    assert got.values[1:3].isnan().all() and got.grad[1:3].isnan().all()
    assert ((got.top1 >= 0) & (got.top1 < 131)).all()
    for after, before in zip(got, clean, strict=True):
        assert torch.equal(after[[0, 3]], before[[0, 3]])


def test_nothing_around_the_rows_and_their_values_is_written(backend, device):
    whole, values = (torch.full(size, 7.0, device=device) for size in ((9, 140), (9, 6)))
    top1 = torch.full((9,), 7, device=device)
    target = torch.tensor([5, 0, -100, 130, 1, 2, 3], device=device)
    kernel = choose(backend, contract.CANDIDATES, whole)
    told = (whole[1:8, 4:135], target, IGNORED, transform_of(Transform()), ALL, values[1:8])
    kernel.statistics(*told, top1[1:8])
    assert (whole == 7.0).all()
    kernel.grad_(*told, coefficients(target))
    assert not whole[3, 4:135].any()
    whole[1:8, 4:135], values[1:8], top1[1:8] = 7.0, 7.0, 7
    assert all((x == 7).all() for x in (whole, values, top1))


def test_the_gradient_of_a_nearly_certain_label_is_not_lost(backend, device):
    """1 - p is 2e-9, which float32 cannot tell from 0 as a difference."""
    logits = torch.tensor([[20.0, 0.0, -1.0]], device=device)
    target, coef = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, 6, device=device)
    coef[:, COLUMNS.index("logp")] = 1.0
    got = run(backend, logits, target, coef, Transform()).grad.double()
    expected = -logits.double().softmax(1)
    expected[0, 0] = -expected[0, 1:].sum()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
