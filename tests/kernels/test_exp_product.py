"""The product that leaves powers of two: what it promises beside the error rule of every backend.

Without a GPU the interpreter plays the kernels, with smaller tiles, so that few rows take several.
"""

from __future__ import annotations

import math

import cases
import interpreter
import oracle
import pytest
import torch
from cases import Case
from cost import budget_of
from oracle import Transform
from test_linear_token_logp import check
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp
from wrpo_kernels.dispatch import triton_backend
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.lm_head.exp_product import form, self_check
from wrpo_kernels.lm_head.head import CANDIDATES
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import reference

BF16 = torch.bfloat16
SMALL = {
    "BLOCK_N": 32,
    "BLOCK_V": 64,
    "BLOCK_K": 32,
    "GROUP": 2,
    "SPLIT": 2,
    "FLATTEN": 0,
    "num_warps": 4,
    "num_stages": 1,
}
NOTHING = LogitTransform(None, 1.0, 0.0, 1.0)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch) -> torch.device:
    if reason := triton_backend.missing():
        pytest.skip(reason)
    if request.param == "cpu":
        interpreter.compute_like_a_gpu()
        monkeypatch.setattr(form, "row_of", lambda name: {"tiles": SMALL, "programs": 1, "has_descriptors": True})
    return torch.device(request.param)


@pytest.fixture
def without_self_check(monkeypatch):
    monkeypatch.setattr(self_check, "mismatch", lambda *call: None)


@pytest.fixture
def through_pointers(device, monkeypatch):
    row = form.row_of(form.architecture(device))
    row = row | {"has_descriptors": False, "tiles": row["tiles"] | {"SPLIT": 1, "FLATTEN": 1}}
    monkeypatch.setattr(form, "row_of", lambda name: row)


def truth_of(hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform = NOTHING):
    """logp [N] and delta [N, V] in float64."""
    delta = hidden.double() @ weight.double().T
    logp = delta.new_empty(len(target))
    reference.delta_(delta, target, -100, transform, logp, logp.new_empty(2, len(target)))
    return logp, delta


def ours_of(hidden: Tensor, weight: Tensor, target: Tensor, transform: LogitTransform = NOTHING, out=None):
    """The same by the kernels, delta in float32, without a look at the labels."""
    from wrpo_kernels.lm_head.exp_product.launch import Operands, Problem, coefficients

    logp = torch.empty(len(target), device=hidden.device)
    if out is None:
        out = torch.empty(len(target), len(weight), dtype=BF16, device=hidden.device)
    Problem(Operands(hidden, weight), target, -100, transform, logp).run(out)
    return logp, out * coefficients(torch.ones_like(logp)[:, None], logp, transform.slope)


def drawn(rows: int, vocabulary: int, width: int, device: torch.device, spread: float = 1.0):
    hidden = (spread * torch.randn(rows, width)).to(device, BF16)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(device, BF16)
    return hidden, weight, torch.randint(0, vocabulary, (rows,)).to(device)


CASES = {
    "ragged everywhere": Case("", (37,), 331, width=93),
    "tiles of rows and of the vocabulary": Case("", (70,), 200, width=72),
    "leading dimensions": cases.SHAPES["batch"],
    "one token": cases.SHAPES["one token"],
    "width one": cases.SHAPES["width one"],
    "no rows": cases.SHAPES["empty"],
    "peaked": cases.VALUES["peaked"],
    "huge": cases.VALUES["huge"],
    "all ignored": cases.VALUES["all ignored"],
    "ends": cases.VALUES["ends"],
    "misaligned": cases.LAYOUTS["misaligned"],
    "transposed": cases.LAYOUTS["transposed"],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_as_good_as_plain_torch(case, device, without_self_check):
    check(*cases.hidden_of(case, BF16, device), Transform(), "triton_exp")


def test_operands_that_no_descriptor_takes_are_read_through_pointers(device, through_pointers, without_self_check):
    check(*cases.hidden_of(CASES["tiles of rows and of the vocabulary"], BF16, device), Transform(), "triton_exp")


@pytest.mark.parametrize("name", cases.TRANSFORMS)
def test_the_transform_of_the_logits_is_applied_in_the_order_of_the_models(name, device, without_self_check):
    transform = cases.TRANSFORMS[name](torch.randn(131, device=device).to(BF16))
    check(*cases.hidden_of(Case("", (6,), 131), BF16, device), transform, "triton_exp")


@pytest.mark.parametrize("wanted", [{"hidden"}, {"weight"}], ids=["frozen head", "head alone"])
@pytest.mark.parametrize("rows", [None, 5, 1])
def test_any_share_of_the_rows_may_fit(rows, wanted, device, without_self_check):
    case = Case("", (7,), 211, width=17)
    budget = None if rows is None else budget_of(rows, case.vocabulary, case.width, BF16)
    check(*cases.hidden_of(case, BF16, device), Transform(), "triton_exp", wanted, budget_bytes=budget)


@pytest.mark.parametrize("spread", [1, 4, 12])
def test_log_probs_have_the_digits_of_float32_and_gradients_are_no_worse(spread, device, without_self_check):
    """bfloat16 logits cost log-probs 3e-3 to 3e-1; the powers keep those of the float32 sums."""
    hidden, weight, target = drawn(64, 520, 96, device, spread)
    c = 0.01 * torch.randn(64, device=device)
    found = {}
    for backend, dtype in (("triton_exp", BF16), ("reference", BF16), ("truth", torch.float64)):
        x, w = (t.to(dtype).detach().requires_grad_() for t in (hidden, weight))
        logp = linear_token_logp(x, w, target, backend="reference" if backend == "truth" else backend)
        found[backend] = (logp.detach(), *torch.autograd.grad(logp, (x, w), c.to(logp.dtype)))
    ours, plain, truth = found["triton_exp"], found["reference"], found["truth"]
    assert (ours[0] - truth[0]).abs().max() < 2e-5 * max(1, spread / 4)
    assert (plain[0] - truth[0]).abs().max() > 2e-3
    for got, other, true in zip(ours[1:], plain[1:], truth[1:], strict=True):
        # Of three roundings to bfloat16 ours leaves out one; the rest is luck at logits of unit variance.
        assert (got - true).norm() < max(1.0 * (other - true).norm(), 3.3e-3 * true.norm())


def test_rows_beyond_the_range_of_the_powers_are_right_and_their_neighbours_unchanged(device):
    hidden, weight, target = drawn(40, 200, 64, device)
    alone_logp, alone = ours_of(hidden, weight, target)
    far = torch.tensor([1, 5, 33], device=device)
    hidden[far] = (-200 * weight[target[far]].float()).to(BF16)
    logp, delta = ours_of(hidden, weight, target)
    true_logp, true_delta = truth_of(hidden, weight, target)
    assert (true_logp[far] < -116).all()
    assert (logp - true_logp).abs().max() < 1e-6 * 300
    assert ((delta - true_delta).abs() <= 2**-8 * true_delta.abs() + 1e-30).all()
    others = torch.ones(40, dtype=torch.bool, device=device)
    others[far] = False
    oracle.assert_same_bits("logp", logp[others], alone_logp[others])
    oracle.assert_same_bits("delta", delta[others], alone[others])


def test_a_label_or_another_token_that_is_masked_gives_what_the_whole_logits_give(device):
    hidden, weight, target = drawn(6, 200, 64, device)
    bias = torch.zeros(200, device=device)
    bias[70:90] = -math.inf
    target[0], target[1] = 75, 12
    transform = NOTHING._replace(bias=bias)
    logp, delta = ours_of(hidden, weight, target, transform)
    true_logp, true_delta = truth_of(hidden, weight, target, transform)
    assert logp[0] == -math.inf and delta[0, 75] == 1.0
    torch.testing.assert_close(logp, true_logp.float(), rtol=1e-6, atol=2e-6)
    assert ((delta - true_delta).abs() <= 2**-8 * true_delta.abs()).all()


def test_the_labels_own_delta_has_its_digits_at_every_margin(device):
    """1 - p of a label that leads by up to 59 nats, where 1 - p is 2^-86; and the row's deltas sum to 0."""
    margins = torch.tensor([5.0, 16.0, 17.0, 30.0, 45.0, 58.0], device=device)
    weight = torch.zeros(130, 16, device=device, dtype=BF16)
    weight[3, 0], weight[:, 1] = 1.0, torch.linspace(-0.5, 0.5, 130)
    hidden = torch.zeros(6, 16, device=device, dtype=BF16)
    hidden[:, 0], hidden[:, 1] = margins.to(BF16), 1.0
    target = torch.full((6,), 3, device=device)
    logp, delta = ours_of(hidden, weight, target)
    true_logp, true_delta = truth_of(hidden, weight, target)
    torch.testing.assert_close(logp.double(), true_logp, rtol=2e-5, atol=0)
    torch.testing.assert_close(delta[:, 3].double(), true_delta[:, 3], rtol=2**-8, atol=0)
    assert (delta.double().sum(1).abs() <= 2**-8 * true_delta[:, 3]).all()


def test_what_is_wrong_stays_in_its_row(device):
    hidden, weight, target = drawn(40, 131, 24, device)
    hidden[2], hidden[9, 3], hidden[11] = math.nan, math.inf, math.nan
    target[4:8] = torch.tensor([131, -1, 2**40, -(2**62)], device=device)
    target[11] = -100
    logp, delta = ours_of(hidden, weight, target)
    wrong = torch.zeros(40, dtype=torch.bool, device=device)
    wrong[[2, 9, 4, 5, 6, 7]] = True
    assert torch.equal(logp.isnan(), wrong)
    assert torch.equal(delta.isnan().all(1), wrong)
    assert delta[~wrong].isfinite().all()
    assert logp[11] == 0 and (delta[11] == 0).all()


def test_what_surrounds_the_output_is_not_written(device):
    hidden, weight, target = drawn(37, 131, 24, device, spread=60)
    whole = torch.full((39, 160), 7.0, dtype=BF16, device=device)
    logp, delta = ours_of(hidden, weight, target, out=whole[1:38, 8:139])
    assert (logp < form.LIMIT + 1e-3).any() and delta.isfinite().all()
    whole[1:38, 8:139] = 7.0
    assert (whole == 7.0).all()


def test_any_number_of_programs_gives_the_same_bits(device, monkeypatch):
    from wrpo_kernels.lm_head.exp_product import launch

    hidden, weight, target = drawn(40, 200, 40, device)
    results = []
    for count in (1, 3, 1000):
        monkeypatch.setattr(launch, "_processors", lambda tensor, count=count: count)
        results.append(ours_of(hidden, weight, target))
    for logp, delta in results[1:]:
        oracle.assert_same_bits("logp", logp, results[0][0])
        oracle.assert_same_bits("delta", delta, results[0][1])


def test_the_forward_alone_gives_the_same_bits_in_pieces_and_at_once(device, monkeypatch, without_self_check):
    from wrpo_kernels.lm_head.exp_product import launch

    hidden, weight, target = drawn(40, 200, 40, device, spread=20)
    with_delta = linear_token_logp(hidden.clone().requires_grad_(), weight, target, backend="triton_exp")
    alone = linear_token_logp(hidden, weight, target, backend="triton_exp")
    tiles = -(-200 // form.row_of(form.architecture(device))["tiles"]["BLOCK_V"])
    monkeypatch.setattr(launch, "SUM_BYTES", 23 * 4 * tiles)  # 23 rows at a time
    in_pieces = linear_token_logp(hidden, weight, target, backend="triton_exp")
    oracle.assert_same_bits("logp", alone, with_delta.detach())
    oracle.assert_same_bits("logp", in_pieces, alone)


@pytest.mark.parametrize("rows", [None, 9], ids=["all rows fit", "pieces of groups"])
def test_the_loss_and_its_gradients_are_those_of_float64(rows, device, without_self_check):
    hidden = torch.randn(4, 7, 40, device=device).to(BF16)
    weight, low, up = (
        torch.randn(*shape, device=device).mul(0.2).to(BF16) for shape in ((150, 40), (4, 7, 8), (150, 8))
    )
    labels = torch.randint(0, 150, (4, 7), device=device)
    labels[1, :3] = -100
    pairs = {"seq_weight": torch.tensor([1.0, -1.0] * 2, device=device), "beta": 0.3}
    pairs["group"] = torch.tensor([0, 0, 1, 1], device=device)
    errors = {}
    for backend, dtype in (("triton_exp", BF16), ("reference", BF16), ("reference", torch.float64)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight, low, up)]
        budget = None if rows is None else budget_of(rows, 150, 48, dtype)
        out = linear_preference_loss(
            *leaves[:2], labels, adapter=tuple(leaves[2:]), budget_bytes=budget, backend=backend, num_groups=2, **pairs
        )
        errors[backend, dtype] = [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]
    *_, truth = errors.values()
    ours, plain, _ = errors.values()
    assert (ours[0] - truth[0]).abs() <= 1e-5
    for got, other, true in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert (got - true).norm() <= max((other - true).norm(), 4e-3 * true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_refused_with_the_reason(dtype, device):
    hidden, weight, target = (x if x.dtype == torch.int64 else x.to(dtype) for x in drawn(3, 11, 8, device))
    with pytest.raises(
        RuntimeError, match="backend='triton_exp' cannot do this call: takes bfloat16, in which powers of two"
    ):
        linear_token_logp(hidden, weight, target, backend="triton_exp")


def test_a_filter_of_gradients_is_refused(device):
    hidden, weight, target = drawn(3, 11, 8, device)
    with pytest.raises(RuntimeError, match="triton_exp: has no grad_filter"):
        linear_token_logp(hidden, weight, target, grad_filter=1e-4, backend="triton_exp")


def test_it_waits_for_its_name_until_the_table_says_where_its_tests_have_run(device, monkeypatch):
    from pathlib import Path

    name = form.architecture(device)
    hidden = torch.zeros(2, 8, dtype=BF16, device=device)
    unproved = {"proved": None}
    alone = tuple(candidate for candidate in CANDIDATES if candidate.NAME == "triton_exp")
    monkeypatch.setattr(form, "row_of", lambda name: unproved)
    assert choose(None, CANDIDATES, hidden).NAME != "triton_exp"
    with pytest.raises(RuntimeError, match=rf"no test has run on {name} \({Path(form.TABLE).name}\)"):
        choose(None, alone, hidden)
    monkeypatch.setattr(form, "row_of", lambda name: {"proved": "somewhere"})
    chosen = choose(None, CANDIDATES, hidden).NAME
    assert (chosen == "triton_exp") == (device.type == "cuda")


@pytest.fixture
def small_self_check(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(self_check, "N", 40)
        monkeypatch.setattr(self_check, "V", 100)
    self_check.mismatch.cache_clear()
    yield
    self_check.mismatch.cache_clear()


def test_a_device_that_multiplies_wrongly_is_found_out_by_the_first_call(device, small_self_check, monkeypatch):
    from wrpo_kernels.lm_head.exp_product import launch

    hidden, weight, target = drawn(3, 11, 8, device)
    assert linear_token_logp(hidden, weight, target, backend="triton_exp").isfinite().all()
    right = launch.delta_of_hidden

    def wrong(operands, target, ignore_index, transform, logp, out):
        right(operands, target, ignore_index, transform, logp, out)
        out[:, 5] *= 1.05

    monkeypatch.setattr(launch, "delta_of_hidden", wrong)
    self_check.mismatch.cache_clear()
    with pytest.raises(RuntimeError, match=r"triton_exp: .* rows of a small problem are wrong on .*; pass another"):
        linear_token_logp(hidden, weight, target, backend="triton_exp")


@pytest.mark.parametrize("call", [(True, False, False), (False, True, True)], ids=["bias", "softcap and adapter"])
def test_the_self_check_agrees_with_what_is_right(call, device, small_self_check):
    assert self_check.mismatch(form.ExpProduct(), device, *call) is None
