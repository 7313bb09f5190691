"""`preference_loss`: the whole family against float64, its reductions, and what it refuses."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from conftest import HERE, PLAYED
from torch import Tensor

from wrpo_kernels import kto_loss, linear_cross_entropy, preference_loss

PLACES = (*HERE, PLAYED)
DPO = {"seq_weight": torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]), "group": torch.tensor([0, 1, 2, 0, 1, 2])}
# Three groups of different make: two weighted sources, two rejected responses, one response alone; in no order.
UNEVEN = {
    "seq_weight": torch.tensor([-1.0, 0.07, 1.0, -0.25, 0.9, 0.03, -0.75, 0.5]),
    "group": torch.tensor([2, 2, 0, 0, 2, 2, 0, 1]),
}
LENGTH = torch.tensor([7, 300, 1, 12, 55, 90, 33, 4])
FAMILY = {
    "sigmoid": {"beta": 0.01},
    "label smoothing": {"beta": 0.1, "label_smoothing": 0.15},
    "large beta": {"beta": 10.0, "gamma": -3.0},
    "hinge": {"beta": 0.02, "loss_type": "hinge"},
    "hinge with gamma": {"beta": 0.02, "loss_type": "hinge", "gamma": 0.5},
    "ipo": {"beta": 0.01, "loss_type": "ipo"},
    "length normalised ipo": {"beta": 0.1, "loss_type": "ipo", "length": LENGTH, "length_normalize": True},
    "simpo": {"beta": 10.0, "gamma": 1.0, "length": LENGTH, "length_normalize": True, "ref_logp": None},
    "length normalised dpo": {"beta": 5.0, "length": LENGTH, "length_normalize": True},
    "nll": {"beta": 0.1, "nll_weight": 0.2},
    "nll of some, by length": {
        "beta": 0.1,
        "nll_weight": torch.tensor([0.0, 0.5, 1.0, 0.0, 0.3, 0.0, -0.1, 2.0]),
        "length": LENGTH,
        "length_normalize": True,
    },
    "weighted groups": {"beta": 0.05, "group_weight": torch.tensor([2.0, 0.0, 0.3])},
    "weighted groups and nll": {"beta": 0.05, "group_weight": torch.tensor([2.0, 0.0, 0.3]), "nll_weight": 0.1},
    "gamma": {"beta": 0.3, "gamma": 1.6},
    "gamma of each group": {"beta": 0.3, "gamma": torch.tensor([1.6, -0.5, 0.0])},
    "beta of each group": {"beta": torch.tensor([0.3, 0.01, 2.0])},
    "ipo, beta of each group": {"beta": torch.tensor([0.3, 0.01, 2.0]), "loss_type": "ipo", "gamma": 0.2},
    "robust": {"beta": 0.1, "loss_type": "robust", "label_smoothing": 0.15},
    "robust of no noise": {"beta": 0.1, "loss_type": "robust"},
    "exo_pair": {"beta": 0.1, "loss_type": "exo_pair", "label_smoothing": 0.001},
    "exo_pair, much smoothing": {"beta": 0.05, "loss_type": "exo_pair", "label_smoothing": 0.3, "gamma": 0.5},
    "discopop": {"beta": 0.02, "loss_type": "discopop"},
    "discopop of tau 1": {"beta": 0.1, "loss_type": "discopop", "discopop_tau": 1.0},
    "discopop of a large tau": {"beta": 0.1, "loss_type": "discopop", "discopop_tau": 3.0},
    "kto": {"beta": 0.1, "loss_type": "kto", "gamma": 0.4},
}
PER_GROUP = ("group_weight", "beta", "gamma")
LOSS_TYPES = {name: {"loss_type": name} for name in ("sigmoid", "robust", "hinge", "ipo", "discopop", "kto")} | {
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1}
}


def moved(options: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def problem(name: str, device: torch.device, layout: dict = UNEVEN) -> tuple[Tensor, dict]:
    size = len(layout["group"])
    logp = -300 * torch.rand(size) - 1
    options = {"ref_logp": logp + 20 * torch.randn(size)} | layout | {"num_groups": 3} | FAMILY[name]
    return logp.to(device), moved(options, device)


def allowed(truth: Tensor, roundings: float = 1.0) -> Tensor:
    """All is computed in float64 and rounded once; `roundings` counts those of float32 after that, in halves of ulp."""
    return roundings * oracle.ulp(truth, torch.float32)


def gradient(loss: Tensor, logp: Tensor, c: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logp, c.to(loss.dtype), retain_graph=True)[0]


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_of_the_family_is_the_formula_in_float64(name, backend, device):
    logp, options = problem(name, device)
    exact = logp.double().requires_grad_()
    truth = oracle.preference_truth(exact, **options)
    x = logp.requires_grad_()
    out = preference_loss(x, **options, reduction="none", backend=backend)
    for field in ("loss", "reward", "margin"):
        got, true = getattr(out, field), getattr(truth, field).detach()
        assert got.dtype == torch.float32
        oracle.assert_rule(field, got, true, true, allowed(true))
    oracle.assert_same_bits("logp", out.logp, logp)
    c = torch.tensor([1.5, -0.3, 0.7], device=device)
    true = gradient(truth.loss, exact, c)
    oracle.assert_rule("grad_logp", gradient(out.loss, x, c), true, true, allowed(true, 2.0))


def test_only_the_loss_carries_a_gradient(backend, device):
    logp, options = problem("nll", device)
    out = preference_loss(logp.requires_grad_(), **options, backend=backend)
    assert out.loss.requires_grad
    assert not any(value.requires_grad for value in out[1:])
    with torch.no_grad():
        assert not preference_loss(logp, **options, backend=backend).loss.requires_grad


def test_gradients_of_each_group_alone(backend, device):
    """A sequence feels its own group only, and -0.0 or garbage elsewhere would show."""
    logp, options = problem("sigmoid", device)
    x = logp.requires_grad_()
    out = preference_loss(x, **options, reduction="none", backend=backend)
    for g in range(3):
        c = torch.zeros(3, device=device)
        c[g] = 1.0
        grad = gradient(out.loss, x, c)
        assert torch.equal(grad != 0, options["group"] == g)


def test_the_order_of_the_sequences_does_not_matter(backend, device):
    logp, options = problem("nll of some, by length", device)
    order = torch.randperm(len(logp), device=device)
    shuffled = {
        name: value[order] if isinstance(value, Tensor) and name not in PER_GROUP else value
        for name, value in options.items()
    }
    a = preference_loss(logp, **options, reduction="none", backend=backend)
    b = preference_loss(logp[order], **shuffled, reduction="none", backend=backend)
    for got, true in ((b.loss, a.loss), (b.margin, a.margin), (b.reward, a.reward[order])):
        oracle.assert_rule("shuffled", got, true.double(), true, allowed(true))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_margins_stay_finite_and_exact(loss_type, backend, device):
    logp = torch.tensor([-1.0, -2.0, -3.0, -1e4, -1.0, -3.0], device=device)
    options = moved(DPO, device) | {"num_groups": 3, "beta": 100.0, **LOSS_TYPES[loss_type]}
    exact, x = logp.double().requires_grad_(), logp.requires_grad_()
    truth = oracle.preference_truth(exact, **options)
    out = preference_loss(x, **options, reduction="none", backend=backend)
    true = truth.loss.detach()
    oracle.assert_rule("loss", out.loss, true, true, allowed(true))
    c = torch.ones(3, device=device)
    true = gradient(truth.loss, exact, c)
    oracle.assert_rule("grad_logp", gradient(out.loss, x, c), true, true, allowed(true, 2.0))


def test_policy_equal_to_the_reference_gives_log_2_exactly(backend, device):
    logp, options = problem("sigmoid", device)
    options["ref_logp"] = logp.clone()
    out = preference_loss(logp, **options, backend=backend)
    assert float(out.loss) == float(torch.tensor(math.log(2.0)))
    assert not out.margin.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, backend, device):
    logp, options = problem("sigmoid", device)
    each = oracle.preference_truth(logp, **options).loss
    true = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    got = preference_loss(logp, **options, reduction=reduction, backend=backend).loss
    oracle.assert_rule("loss", got, true, true, allowed(true, 3.0))  # two sums and a division more


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_a_normalizer_makes_uneven_micro_batches_add_up(kind, backend, device):
    """Groups in micro-batches of 3 and 1: losses and gradients sum to those of one batch of 4."""
    logp, ref = -100 * torch.rand(8, device=device), -100 * torch.rand(8, device=device)
    weight = torch.tensor([1.0, -1.0] * 4, device=device)
    group = torch.arange(4, device=device).repeat_interleave(2)
    whole = logp.clone().requires_grad_()
    options = {"beta": 0.1, "backend": backend}
    loss = preference_loss(whole, ref, seq_weight=weight, group=group, **options).loss
    loss.backward()
    normalizer = 4 if kind == "number" else torch.tensor(4.0, device=device)
    total, grads = 0.0, []
    for part in (slice(0, 6), slice(6, 8)):
        x = logp[part].clone().requires_grad_()
        local = group[part] - group[part][0]
        out = preference_loss(x, ref[part], seq_weight=weight[part], group=local, normalizer=normalizer, **options)
        out.loss.backward()
        total, grads = total + out.loss.detach(), [*grads, x.grad]
    oracle.assert_rule("loss", total, loss.detach().double(), loss, allowed(loss.detach(), 3.0))
    oracle.assert_same_bits("grad", torch.cat(grads), whole.grad)


def test_num_groups_is_read_from_the_groups_or_given(backend, device):
    logp, options = problem("sigmoid", device)
    given = preference_loss(logp, **options, backend=backend)
    read = preference_loss(logp, **options | {"num_groups": None}, backend=backend)
    oracle.assert_same_bits("loss", read.loss, given.loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_is_nan_exactly_where_its_gradient_is(bad, loss_type, backend, device):
    """A guard that skips a step by its gradients sees what one by the loss sees. Of hinge an infinite margin is either
    won or lost by a slope of -1."""
    logp, options = problem("sigmoid", device)
    options |= {"beta": 0.3, **LOSS_TYPES[loss_type]}
    options["ref_logp"][2] = bad  # of group 0, whose other members are 3 and 6
    x = logp.requires_grad_()
    out = preference_loss(x, **options, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    assert out.loss[1:].isfinite().all()
    assert torch.equal(grad.isnan(), out.loss.isnan()[options["group"]])
    assert bool(out.loss[0].isnan()) == math.isnan(bad)


def test_a_weight_of_zero_takes_its_term_out_whatever_that_holds(backend, device):
    """A sequence without weight beside a margin that is no number, and a group without weight."""
    logp, options = problem("nll", device)
    options["seq_weight"], options["nll_weight"] = options["seq_weight"].clone(), torch.ones(8, device=device)
    options["seq_weight"][3] = options["nll_weight"][3] = 0.0
    options["ref_logp"][2] = math.nan
    x = logp.requires_grad_()
    out = preference_loss(x, **options, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    assert out.loss[0].isnan() and grad[2].isnan()
    assert grad[3] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_response_of_no_length_has_no_reward_whatever_its_reference(bad, backend, device):
    logp, options = problem("length normalised dpo", device)
    options["length"] = options["length"].clone()
    options["length"][2], options["ref_logp"][2] = 0, bad
    x = logp.requires_grad_()
    out = preference_loss(x, **options, empty="zero", reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    assert out.reward[2] == 0
    for values in out:
        assert values.isfinite().all()
    assert grad.isfinite().all() and not grad[options["group"] == 0].any()


def test_no_sequences_at_all_give_a_loss_of_zero(backend, device):
    logp = torch.zeros(0, device=device, requires_grad=True)
    weight, group = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    out = preference_loss(logp, seq_weight=weight, group=group, beta=0.1, backend=backend)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert logp.grad.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_of_weight_zero_leaves_no_trace_whatever_it_holds(bad, backend, device):
    logp, options = problem("sigmoid", device)
    first = (options["group"] == 0).nonzero()[0]
    options["group_weight"] = torch.tensor([0.0, 1.0, 1.0], device=device)
    clean = preference_loss(logp, **options, backend=backend)
    logp[first] = bad
    x = logp.requires_grad_()
    out = preference_loss(x, **options, backend=backend)
    out.loss.backward()
    oracle.assert_same_bits("loss", out.loss, clean.loss)
    assert not x.grad[options["group"] == 0].any()  # exactly 0, and NaN would count as True
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_sequence_of_weight_zero_leaves_no_trace_whatever_it_holds(bad, backend, device):
    logp, options = problem("sigmoid", device)
    options["seq_weight"] = options["seq_weight"].clone()
    options["seq_weight"][1] = 0.0
    clean = preference_loss(logp, **options, backend=backend)
    logp[1] = bad
    x = logp.requires_grad_()
    out = preference_loss(x, **options, backend=backend)
    out.loss.backward()
    oracle.assert_same_bits("loss", out.loss, clean.loss)
    assert float(x.grad[1]) == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("length_normalize", [False, True])
def test_an_empty_response_is_an_error_that_names_the_sequence(length_normalize, backend, device):
    logp, options = problem("sigmoid", device)
    length = LENGTH.clone().to(device)
    length[5] = 0
    rest = {"length": length, "length_normalize": length_normalize, "backend": backend}
    if device.type == "cpu":
        with pytest.raises(ValueError, match="sequence 5 has no counted token"):
            preference_loss(logp, **options, **rest)
    else:  # reading the lengths would wait for the device
        assert all(value.isfinite().all() for value in preference_loss(logp, **options, **rest))


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("nll_weight", [0.0, 0.2])
def test_an_empty_response_can_switch_its_group_off(nll_weight, length_normalize, backend, device):
    """The group counts nothing and leaves the mean: the others have the loss that they have without it."""
    logp, options = problem("sigmoid", device)
    length = LENGTH.clone().to(device)
    empty = 5  # in group 2
    length[empty], logp[empty], options["ref_logp"][empty] = 0, 0.0, 0.0
    x = logp.requires_grad_()
    rest = {"length_normalize": length_normalize, "nll_weight": nll_weight, "backend": backend}
    out = preference_loss(x, **options, length=length, empty="zero", **rest)
    out.loss.backward()
    kept = options["group"] != 2
    others = {name: value[kept] for name, value in options.items() if isinstance(value, Tensor)}
    y = logp.detach()[kept].requires_grad_()
    alone = preference_loss(y, **others, length=length[kept], num_groups=2, beta=0.01, **rest)
    alone.loss.backward()
    oracle.assert_same_bits("loss", out.loss, alone.loss)
    oracle.assert_same_bits("grad", x.grad[kept], y.grad)
    assert not x.grad[~kept].any()
    assert out.margin.isfinite().all()
    assert out.reward.isfinite().all()


@pytest.mark.parametrize("length_normalize", [False, True])
def test_a_batch_of_empty_responses_alone_gives_zero_not_nan(length_normalize, backend, device):
    logp = torch.zeros(6, device=device, requires_grad=True)
    length = torch.zeros(6, dtype=torch.int64, device=device)
    rest = {"length": length, "length_normalize": length_normalize, "nll_weight": 0.1, "backend": backend}
    out = preference_loss(logp, beta=0.1, empty="zero", **moved(DPO, device), **rest)
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert not logp.grad.any()


def test_the_graph_can_be_walked_twice_and_inputs_stay(backend, device):
    logp, options = problem("nll", device)
    before = {name: value.clone() for name, value in options.items() if isinstance(value, Tensor)}
    x, copy = logp.requires_grad_(), logp.detach().clone()
    loss = preference_loss(x, **options, backend=backend).loss
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    oracle.assert_same_bits("grad", torch.autograd.grad(loss, x)[0], first)
    oracle.assert_same_bits("logp", x, copy)
    assert all(torch.equal(options[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", ["every other", "expanded"])
def test_strided_inputs(layout, backend, device):
    logp, options = problem("sigmoid", device)
    if layout == "expanded":
        options["ref_logp"] = torch.tensor(-100.0, device=device).expand(8)
        strided = options
    else:
        strided = {
            name: value.repeat_interleave(2)[::2] if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
    contiguous = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in options.items()}
    a = preference_loss(logp.repeat_interleave(2)[::2], **strided, backend=backend)
    b = preference_loss(logp, **contiguous, backend=backend)
    for got, expected, name in zip(a, b, a._fields, strict=True):
        oracle.assert_same_bits(name, got, expected)


GOOD = {"logp": torch.zeros(6), "beta": 0.1, **DPO}
REFUSED = {
    "logp of another type": ({"logp": [0.0]}, TypeError, "logp.*list"),
    "one group for all": (
        {"group": torch.tensor(0), "num_groups": None},
        ValueError,
        r"^group must be \[S\], got \[\]",
    ),
    "beta of another type": ({"beta": torch.ones(3, dtype=torch.complex64)}, ValueError, "^beta must be float"),
    "gamma of whole numbers": ({"gamma": torch.ones(3).long()}, ValueError, "^gamma must be float"),
    "logp a matrix": ({"logp": torch.zeros(3, 2)}, ValueError, r"logp.*\[S\].*\[3, 2\]"),
    "half-precision logp": ({"logp": torch.zeros(6).bfloat16()}, ValueError, "logp.*float32.*bfloat16"),
    "ref_logp of another length": ({"ref_logp": torch.zeros(3)}, ValueError, r"ref_logp.*\[S\].*\[6\].*\[3\]"),
    "ref_logp a number": ({"ref_logp": 0.0}, TypeError, "ref_logp.*float"),
    "ref_logp elsewhere": ({"ref_logp": torch.zeros(6, device="meta")}, ValueError, "ref_logp.*cpu.*meta"),
    "ref_logp that wants a gradient": (
        {"ref_logp": torch.zeros(6, requires_grad=True)},
        ValueError,
        "ref_logp.*requires grad.*detach",
    ),
    "integer ref_logp": ({"ref_logp": torch.zeros(6).long()}, ValueError, "ref_logp.*int64"),
    "seq_weight of another length": ({"seq_weight": torch.ones(5)}, ValueError, r"seq_weight.*\[6\].*\[5\]"),
    "seq_weight a list": ({"seq_weight": [1.0] * 6}, TypeError, "seq_weight.*list"),
    "seq_weight that wants a gradient": (
        {"seq_weight": torch.ones(6, requires_grad=True)},
        ValueError,
        "seq_weight.*requires grad",
    ),
    "group a list": ({"group": [0] * 6}, TypeError, "group.*list"),
    "float group": ({"group": torch.zeros(6)}, ValueError, "group.*int64.*float32"),
    "group of another length": ({"group": torch.zeros(5).long()}, ValueError, r"group.*\[6\].*\[5\]"),
    "negative group": ({"group": torch.tensor([0, 1, 2, 0, -1, 2])}, ValueError, "group.*-1"),
    "group beyond G": ({"num_groups": 2}, ValueError, "group.*G=2.*2"),
    "group beyond G with lengths": (
        {"num_groups": 2, "length": torch.ones(6).long(), "empty": "zero"},
        ValueError,
        "group.*G=2.*2",
    ),
    "group ids with gaps": (
        {"group": torch.tensor([3, 41, 7, 3, 41, 7])},
        ValueError,
        r"group.*\[0, G=42\).*no sequence is in group 0.*unique",
    ),
    "more groups than sequences name": ({"num_groups": 5}, ValueError, r"\[0, G=5\).*group 3"),
    "no group for the sequences": ({"num_groups": 0}, ValueError, "num_groups.*>= 1.*6.*0"),
    "empty responses without lengths": ({"empty": "zero"}, ValueError, "empty='zero' needs"),
    "negative num_groups": ({"num_groups": -1}, ValueError, "num_groups.*-1"),
    "num_groups a fraction": ({"num_groups": 3.5}, TypeError, "num_groups.*float"),
    "beta of torch, 0-d": ({"beta": torch.tensor(0.1)}, ValueError, r"beta.*\[G\] = \[3\].*got \[\]"),
    "seq_weight in 16 bits": ({"seq_weight": torch.ones(6).bfloat16()}, ValueError, r"seq_weight.*float\(\)$"),
    "ref_logp in 16 bits": ({"ref_logp": torch.ones(6).bfloat16()}, ValueError, r"ref_logp.*float32.*whole nats"),
    "beta 0": ({"beta": 0.0}, ValueError, "beta.*> 0.*0"),
    "negative beta": ({"beta": -0.1}, ValueError, "beta.*-0.1"),
    "NaN beta": ({"beta": math.nan}, ValueError, "beta.*nan"),
    "beta as text": ({"beta": "0.1"}, TypeError, "beta.*str"),
    "infinite gamma": ({"gamma": math.inf}, ValueError, "gamma.*inf"),
    "unknown loss": ({"loss_type": "dpo"}, ValueError, "loss_type.*sigmoid.*hinge.*ipo.*'dpo'"),
    "smoothing 1/2": ({"label_smoothing": 0.5}, ValueError, r"label_smoothing.*0\.5.*0\.5"),
    "negative smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*-0.1"),
    "exo_pair without smoothing": ({"loss_type": "exo_pair"}, ValueError, "label_smoothing.*exo_pair.*0.001"),
    "tau 0": ({"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, "discopop_tau.*> 0.*0.0"),
    "beta of every sequence": ({"beta": torch.ones(6)}, ValueError, r"beta.*\[G\] = \[3\].*\[6\]"),
    "a beta of 0": ({"beta": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "beta.*> 0.*0.0"),
    "a gamma that is no number": ({"gamma": torch.tensor([1.0, 0.0, math.nan])}, ValueError, "gamma.*finite.*nan"),
    "smoothing of a hinge": ({"label_smoothing": 0.1, "loss_type": "hinge"}, ValueError, "label_smoothing.*'hinge'"),
    "float length": ({"length": torch.ones(6)}, ValueError, "length.*int64.*float32"),
    "length of another shape": ({"length": torch.ones(2, 3).long()}, ValueError, r"length.*\[6\].*\[2, 3\]"),
    "negative length": ({"length": -torch.ones(6).long(), "length_normalize": True}, ValueError, "length.*-1"),
    "no length to normalise by": ({"length_normalize": True}, ValueError, "length_normalize.*needs length"),
    "negative nll_weight": ({"nll_weight": -0.5}, ValueError, "nll_weight.*-0.5"),
    "nll_weight of another length": ({"nll_weight": torch.ones(3)}, ValueError, r"nll_weight.*\[6\].*\[3\]"),
    "nll_weight beyond float32": ({"nll_weight": 1e39}, ValueError, r"nll_weight.*<= 3.*e\+38.*1e\+39"),
    "no seq_weight": ({"seq_weight": None}, TypeError, "seq_weight.*NoneType"),
    "no group": ({"group": None}, TypeError, "group.*NoneType"),
    "no group of a known number": ({"group": None, "num_groups": 3}, TypeError, "group.*NoneType"),
    "normalizer elsewhere": ({"normalizer": torch.tensor(3.0, device="meta")}, ValueError, "normalizer.*cpu.*meta"),
    "sparse normalizer": ({"normalizer": torch.ones(1).to_sparse()}, ValueError, "normalizer.*dense.*to_dense"),
    "nll_weight as text": ({"nll_weight": "0.1"}, TypeError, "nll_weight.*str"),
    "group_weight of another length": ({"group_weight": torch.ones(6)}, ValueError, r"group_weight.*\[3\].*\[6\]"),
    "group_weight a number": ({"group_weight": 2.0}, TypeError, "group_weight.*float"),
    "normalizer 0 as a tensor": ({"normalizer": torch.tensor(0.0)}, ValueError, "normalizer.*0"),
    "normalizer that wants a gradient": (
        {"normalizer": torch.tensor(3.0, requires_grad=True)},
        ValueError,
        "normalizer.*detach",
    ),
    "length_normalize as text": ({"length_normalize": "yes"}, TypeError, "length_normalize.*True or False.*'yes'"),
    "beta beyond float64": ({"beta": 10**400}, ValueError, "beta.*1329 bits"),
    "groups without number": ({"num_groups": 2**70}, ValueError, "num_groups.*71 bits"),
    "too many groups": ({"num_groups": 2**40}, ValueError, r"num_groups.*2\^31.*1099511627776"),
    "negative length beside empty": (
        {"length": -torch.ones(6).long(), "empty": "zero"},
        ValueError,
        "length.*>= 0.*-1",
    ),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction.*mean.*sum.*none.*'avg'"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer.*0"),
    "NaN normalizer": ({"normalizer": math.nan}, ValueError, "normalizer.*nan"),
    "normalizer of several": ({"normalizer": torch.ones(3)}, ValueError, r"normalizer.*\[3\]"),
    "normalizer of a sum": ({"normalizer": 8, "reduction": "sum"}, ValueError, "normalizer.*mean.*'sum'"),
    "unknown empty": ({"empty": "ignore"}, ValueError, "empty.*raise.*zero.*'ignore'"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend.*native.*reference.*'fast'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        preference_loss(**{**GOOD, **changes})


def test_a_float64_normalizer_leaves_the_loss_in_float32():
    logp, weight, group = torch.zeros(2), torch.tensor([1.0, -1.0]), torch.zeros(2).long()
    normalizer = torch.tensor(2.0, dtype=torch.float64)
    assert (
        preference_loss(logp, seq_weight=weight, group=group, beta=1.0, normalizer=normalizer).loss.dtype == logp.dtype
    )


LARGE = 10**30  # beyond int64, within float32


@pytest.mark.parametrize("name", ["nll_weight", "desirable_weight", "undesirable_weight", "z_loss"])
def test_a_large_whole_number_is_the_number_that_it_is(name):
    logp, head = -torch.rand(6), (torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5)
    call = {
        "nll_weight": lambda **option: preference_loss(logp, beta=0.1, **DPO, **option).loss,
        "z_loss": lambda **option: linear_cross_entropy(*head, **option),
    }.get(name, lambda **option: kto_loss(logp, is_desirable=torch.arange(6) % 2 == 0, **option).loss)
    assert torch.equal(call(**{name: LARGE}), call(**{name: float(LARGE)}))
