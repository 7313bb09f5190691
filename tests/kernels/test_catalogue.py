"""The losses of `preference_loss` that are no function of one margin, and their sums, against float64."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, PLAYED
from torch import Tensor

from wrpo_kernels import linear_preference_loss, linear_token_logp, preference_loss

PLACES = (*HERE, PLAYED)
BETA = 0.3
LENGTH = torch.tensor([7, 300, 21, 12, 55, 90, 33, 4, 16, 70, 8, 5])
# Three triples (two preferred, one rejected) and a pair with a second rejected response, in no order.
WEIGHT = torch.tensor([0.3, 1.0, -1.0, 0.7, -1.0, 0.1, -0.4, 0.9, -1.0, 0.25, -0.6, 0.75])
GROUP = torch.tensor([0, 3, 0, 0, 1, 1, 3, 1, 2, 2, 3, 2])
LAYOUT = {"seq_weight": WEIGHT, "group": GROUP, "num_groups": 4}


def by_group(values: Tensor) -> Tensor:
    return torch.stack([values[GROUP.to(values.device) == g].sum() for g in range(4)])


class Sides:
    """What the formulas are made of, float64: log-ratios u, their sums over each side, lengths."""

    def __init__(self, logp: Tensor, ref_logp: Tensor):
        self.logp, self.ref_logp, self.weight = logp, ref_logp, WEIGHT.to(logp.device).double()
        self.length = LENGTH.to(logp.device).double()
        self.chosen, self.rejected = self.weight.clamp(min=0), (-self.weight).clamp(min=0)

    def of(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return by_group(self.chosen * values), by_group(self.rejected * values)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        return self.of(BETA * (self.logp - self.ref_logp))

    @property
    def per_token(self) -> Tensor:
        c, r = self.of((self.logp - self.ref_logp) / self.length)
        return c - r


def softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)


def bco_pair(x: Sides) -> Tensor:
    c, r = x.rewards
    return softplus(-c) + softplus(r)


def nca_pair(x: Sides) -> Tensor:
    c, r = x.rewards
    return softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r)


def sppo_hard(x: Sides) -> Tensor:
    c, r = x.rewards
    return (c / BETA - 0.5 / BETA) ** 2 + (r / BETA + 0.5 / BETA) ** 2


def apo_zero(x: Sides) -> Tensor:
    c, r = x.rewards
    return 1 - torch.sigmoid(c) + torch.sigmoid(r)


def apo_down(x: Sides) -> Tensor:
    c, r = x.rewards
    return torch.sigmoid(c) + 1 - torch.sigmoid(c - r)


def aot(x: Sides) -> Tensor:
    """Of the policy's margin of some rank and the reference's of that rank; in the place of the policy's group."""
    (c, r), (ref_c, ref_r) = x.of(x.logp), x.of(x.ref_logp)
    policy, reference = c - r, (ref_c - ref_r).sort().values
    return softplus(-BETA * (policy - reference[policy.argsort().argsort()]))


def aot_unpaired(x: Sides) -> Tensor:
    c, r = x.rewards
    return softplus(r.sort().values[c.argsort().argsort()] - c)


def orpo(x: Sides) -> Tensor:
    p = (x.logp / x.length).exp()
    c, r = x.of((p / (1 - p)).log())
    return BETA * softplus(r - c)


def sft(x: Sides) -> Tensor:
    tokens = (x.chosen * x.length).sum()
    return -by_group(x.chosen * x.logp) * 4 / tokens


FORMULAS: dict[str, Callable[[Sides], Tensor]] = {
    "bco_pair": bco_pair,
    "nca_pair": nca_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "orpo": orpo,
    "sft": sft,
    "sigmoid_norm": lambda x: softplus(-BETA * x.per_token),
    "ipo_norm": lambda x: (x.per_token - 1 / (2 * BETA)) ** 2,
    "sigmoid": lambda x: softplus(x.rewards[1] - x.rewards[0]),
}
BENT: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda u: 1 - (-u).exp(),
    "js_divergence": lambda u: (2 * u.exp() / (1 + u.exp())).log(),
    "alpha_divergence": lambda u: (u.exp() ** -0.5 - 1) / -0.5,
}


def problem(device: torch.device) -> tuple[Tensor, dict]:
    logp = -2 * LENGTH * torch.rand(12) - 1
    options = {"ref_logp": logp + 4 * torch.randn(12), "beta": BETA, "length": LENGTH} | LAYOUT
    return logp.to(device), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def check(options: dict, logp: Tensor, formula: Callable[[Sides], Tensor], backend: str) -> None:
    """Losses and gradients but for a few roundings to float32: of each term, and of the log-ratios that are bent."""
    exact, x = logp.double().requires_grad_(), logp.clone().requires_grad_()
    truth = formula(Sides(exact, options["ref_logp"].double()))
    out = preference_loss(x, **options, reduction="none", backend=backend)
    assert out.loss.dtype == torch.float32 and out.loss.requires_grad and not out.reward.requires_grad
    c = torch.tensor([1.5, -0.3, 0.7, 1.1], device=logp.device)
    (true,) = torch.autograd.grad(truth, exact, c.double())
    (grad,) = torch.autograd.grad(out.loss, x, c)
    for name, got, expected in (("loss", out.loss, truth), ("gradient", grad, true)):
        slack = 2e-6 * (expected.abs() + expected.abs().mean()).detach()
        oracle.assert_rule(name, got, expected.detach(), expected.detach(), slack)
    plain = preference_loss(logp, **options | {"loss_type": "sigmoid", "loss_weights": None}, backend=backend)
    assert torch.equal(out.reward, plain.reward) and torch.equal(out.margin, plain.margin)


@pytest.mark.parametrize("name", FORMULAS)
def test_every_loss_of_the_catalogue_is_its_formula(name, backend, device):
    logp, options = problem(device)
    check(options | {"loss_type": [name], "loss_weights": [0.5]}, logp, lambda x: 0.5 * FORMULAS[name](x), backend)


def test_several_losses_are_added_up_each_by_its_weight_and_the_likelihood_once(backend, device):
    logp, options = problem(device)
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0, "sigmoid_norm": -0.3}
    options |= {"loss_type": list(weights), "loss_weights": list(weights.values()), "nll_weight": 0.25}

    def formula(x: Sides) -> Tensor:
        return sum(weight * FORMULAS[name](x) for name, weight in weights.items()) - 0.25 * by_group(x.logp)

    check(options, logp, formula, backend)


@pytest.mark.parametrize("kind", BENT)
@pytest.mark.parametrize("name", ["sigmoid", "ipo_norm"])
def test_a_divergence_bends_the_log_ratios(kind, name, backend, device):
    logp, options = problem(device)

    def formula(x: Sides) -> Tensor:
        return FORMULAS[name](Sides(BENT[kind](x.logp - x.ref_logp), torch.zeros_like(x.logp)))

    check(options | {"loss_type": name, "f_divergence_type": kind}, logp, formula, backend)


def test_a_divergence_of_alpha_1_is_the_reverse_kl(backend, device):
    logp, options = problem(device)
    plain = preference_loss(logp, **options, backend=backend)
    bent = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}
    oracle.assert_same_bits("loss", preference_loss(logp, **options, **bent, backend=backend).loss, plain.loss)


@pytest.mark.parametrize("name", FORMULAS)
def test_log_ratios_beyond_every_exponential_leave_no_nan(name, backend, device):
    logp, options = problem(device)
    options |= {"beta": 100.0, "loss_type": [name], "loss_weights": [1.0]}
    x = logp.requires_grad_()
    out = preference_loss(x, **options, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_group_of_weight_zero_leaves_no_trace_in_any_loss(name, backend, device):
    """Nor in the ranks and the token count that the others share."""
    logp, options = problem(device)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device)
    options |= {"loss_type": [name], "loss_weights": [1.0], "group_weight": weight, "reduction": "none"}
    clean = preference_loss(logp, **options, backend=backend).loss
    logp[options["group"] == 1] = -torch.inf
    x = logp.requires_grad_()
    out = preference_loss(x, **options, backend=backend)
    (grad,) = torch.autograd.grad(out.loss.sum(), x)
    oracle.assert_same_bits("loss", out.loss, clean)
    assert not grad[options["group"] == 1].any() and grad.isfinite().all()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_group_weight_is_a_factor_of_every_loss(name, backend, device):
    logp, options = problem(device)
    options |= {"loss_type": [name], "loss_weights": [1.0], "reduction": "none"}
    weight = torch.tensor([2.0, 0.5, 1.0, 4.0], device=device)
    one = preference_loss(logp, **options, backend=backend).loss
    torch.testing.assert_close(
        preference_loss(logp, **options, group_weight=weight, backend=backend).loss, weight * one
    )


def test_unpaired_transport_sorts_the_rewards_each_of_its_own_beta(backend, device):
    logp, options = problem(device)
    beta = torch.tensor([0.02, 3.0, 0.4, 0.1], device=device)
    exact, x = logp.double().requires_grad_(), logp.clone().requires_grad_()
    sides = Sides(exact, options["ref_logp"].double())
    c, r = sides.of(beta.double()[options["group"]] * (sides.logp - sides.ref_logp))
    truth = softplus(r.sort().values[c.argsort().argsort()] - c).sum()
    loss = preference_loss(
        x, **options | {"beta": beta, "loss_type": "aot_unpaired", "reduction": "sum"}, backend=backend
    ).loss
    torch.testing.assert_close(loss.double(), truth)
    (grad,), (true,) = torch.autograd.grad(loss, x), torch.autograd.grad(truth, exact)
    torch.testing.assert_close(grad.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sure", [0, 1])
def test_odds_of_a_sure_response_are_finite_with_their_gradient(sure, backend, device):
    """Also where rounding has made of its log-prob a little more than 0."""
    for value in (0.0, 1e-9):
        logp = torch.tensor([-0.7, -0.7], device=device).index_fill_(0, torch.tensor(sure, device=device), value)
        pair = {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.tensor([0, 0]), "length": torch.tensor([1, 1])}
        pair = {name: tensor.to(device) for name, tensor in pair.items()}
        x = logp.requires_grad_()
        loss = preference_loss(x, **pair, beta=0.1, loss_type="orpo", backend=backend).loss
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and loss >= 0 and grad.isfinite().all()
        assert grad[0] < 0 < grad[1]


@pytest.mark.parametrize("nats", [20.0, 200.0])
def test_a_sure_rejected_token_is_still_unlearnt_from_hidden_states(nats):
    hidden, head = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[0.5, nats], [0.0, 0.0], [0.0, 0.0]])
    given = [x.requires_grad_() for x in (hidden, head)]
    pair = {"seq_weight": torch.tensor([1.0, -1.0]), "group": torch.tensor([0, 0])}
    out = linear_preference_loss(*given, torch.tensor([[0], [0]]), **pair, beta=0.1, loss_type="orpo")
    grads = torch.autograd.grad(out.loss, given)
    assert out.loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (out.logp[1] == 0) if nats == 200 else (grads[0][1, 0, 1] > 0)


def test_an_empty_response_leaves_no_trace_in_the_odds(backend, device):
    logp, options = problem(device)
    length = options["length"].clone()
    length[4], logp[4] = 0, 0.0
    x = logp.requires_grad_()
    loss = preference_loss(
        x, **options | {"length": length, "loss_type": "orpo", "empty": "zero"}, backend=backend
    ).loss
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and not grad[options["group"] == 1].any()


@pytest.mark.parametrize("name", ["bco_pair", "sft", "aot"])
def test_from_hidden_states_it_is_the_loss_of_their_log_probs(name):
    hidden = torch.randn(12, 9, 6, requires_grad=True)
    weight = torch.randn(40, 6, requires_grad=True)
    labels = torch.randint(0, 40, (12, 9)).masked_fill(torch.rand(12, 9) < 0.3, -100)
    labels[:, 0] = 1
    ref_logp = -20 * torch.rand(12)
    options = LAYOUT | {"loss_type": [name, "sigmoid"], "beta": BETA}
    for budget in (None, 200):
        out = linear_preference_loss(hidden, weight, labels, ref_logp, **options, budget_bytes=budget)
        logp = linear_token_logp(hidden, weight, labels).double().sum(1).float()
        true = preference_loss(logp, ref_logp, **options, length=(labels != -100).sum(1))
        torch.testing.assert_close(out.loss, true.loss)
        got, expected = (torch.autograd.grad(x.loss, (hidden, weight)) for x in (out, true))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["nca_pair", "aot", "aot_unpaired", "sft", "orpo"])
def test_the_catalogue_compiles_into_one_graph(name):
    logp, options = problem(torch.device("cpu"))
    options |= {"loss_type": [name, "sigmoid_norm"], "loss_weights": [1.0, 0.5], "nll_weight": 0.1}
    compiled = torch.compile(lambda x: preference_loss(x, **options).loss, fullgraph=True, backend="aot_eager")
    x = logp.requires_grad_()
    expected = preference_loss(x, **options).loss
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(expected, x))


REFUSED = {
    "a name": ({"loss_type": "dpo"}, "loss_type.*bco_pair.*'dpo'"),
    "a name among others": ({"loss_type": ["sigmoid", "dpo"]}, r"loss_type.*\['sigmoid', 'dpo'\]"),
    "no name": ({"loss_type": []}, r"loss_type.*got \[\]"),
    "weights that are too few": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights.*2.*got 1"),
    "a margin of none": ({"loss_type": ["bco_pair", "sft"], "gamma": 0.5}, "gamma belongs to a margin.*bco_pair, sft"),
    "no length": ({"loss_type": "sft", "length": None}, "'sft' needs length"),
    "smoothing of none": ({"loss_type": ["bco_pair", "sft"], "label_smoothing": 0.1}, "label_smoothing.*0.1.*bco_pair"),
    "exo without smoothing": ({"loss_type": ["sft", "exo_pair"]}, "label_smoothing.*exo_pair"),
    "a divergence": ({"f_divergence_type": "total_variation"}, "f_divergence_type.*total_variation"),
    "a divergence of two sides": (
        {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"},
        "forward_kl.*one margin.*bco_pair",
    ),
    "a divergence from nothing": ({"f_divergence_type": "forward_kl", "ref_logp": None}, "forward_kl.*needs ref_logp"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_means_nothing_is_refused(name):
    changes, message = REFUSED[name]
    logp, options = problem(torch.device("cpu"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        preference_loss(logp, **options | changes)


def test_one_number_as_the_weights_of_losses_is_named():
    logp, options = problem(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"loss_weights must be a list of numbers.*got 2\.0"):
        preference_loss(logp, **options, loss_weights=2.0)


@pytest.mark.parametrize("loss_type", [{"sigmoid", "hinge"}, {"sigmoid": 1.0}, None])
def test_losses_without_an_order_are_refused(loss_type):
    logp, options = problem(torch.device("cpu"))
    with pytest.raises(TypeError, match="loss_type must be a name or a list of names, got"):
        preference_loss(logp, **options | {"loss_type": loss_type})
