"""The losses of the paper under their own names: `wrpo_loss` is the paper's formula in float64, in every variant."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import logsigmoid

from wrpo_kernels import linear_wrpo_loss, preference_loss, wrpo_loss

B = 5
ALPHAS = {
    "0": 0.0,
    "0.1": 0.1,
    "1": 1.0,
    "integer": 1,
    "0-d tensor": torch.tensor(0.3),
    "[B]": torch.tensor([0.0, 0.1, 0.25, 0.9, 1.0]),
    "[B, 1]": torch.tensor([[0.0], [0.1], [0.25], [0.9], [1.0]]),
    "[B] in bfloat16": torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0]).bfloat16(),
}


class Batch:
    """Log-probs [S] of policy and reference, and the same as the paper names them: [K, B], [B], [B] in float64."""

    def __init__(self, device: torch.device, sources: int = 1) -> None:
        size = (sources + 2) * B
        self.logp = -300 * torch.rand(size, device=device) - 1
        self.ref_logp = self.logp + 20 * torch.randn(size, device=device)
        self.length = torch.randint(1, 400, (size,), device=device)
        self.sources = sources
        self.exact = self.logp.double().requires_grad_()

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = values.double().view(-1, B)
        return rows[: self.sources], rows[-2], rows[-1]

    def check(self, truth: Tensor, roundings: float = 3.0, **options) -> None:
        """Loss (a mean over B in float32, on results rounded once) and gradient."""
        x = self.logp.detach().requires_grad_()
        out = wrpo_loss(x, num_sources=self.sources, **options)
        slack = roundings * oracle.ulp(truth.detach(), torch.float32)
        oracle.assert_rule("loss", out.loss, truth.detach(), truth, slack)
        (grad,) = torch.autograd.grad(out.loss, x)
        (true,) = torch.autograd.grad(truth, self.exact)
        oracle.assert_rule("grad_logp", grad, true, true, roundings * oracle.ulp(true, torch.float32))


def alpha_column(alpha: float | Tensor, device: torch.device) -> float | Tensor:
    """[B] float64 or a number, however it was given."""
    return alpha.double().to(device).reshape(-1).squeeze() if isinstance(alpha, Tensor) else alpha


def given(alpha: float | Tensor, device: torch.device) -> float | Tensor:
    return alpha.to(device) if isinstance(alpha, Tensor) else alpha


@pytest.mark.parametrize("name", ALPHAS)
def test_wrpo_is_the_formula_of_the_paper(name, backend, device):
    """-log sigmoid( alpha beta D_ws + (1 - alpha) beta D_wt - beta D_l ),   D = log(pi / pi_ref)"""
    batch, beta, a = Batch(device), 0.01, alpha_column(ALPHAS[name], device)
    (ws,), wt, rejected = batch.split(batch.exact - batch.ref_logp.double())
    truth = -logsigmoid(a * beta * ws + (1 - a) * beta * wt - beta * rejected).mean()
    batch.check(truth, ref_logp=batch.ref_logp, alpha=given(ALPHAS[name], device), backend=backend)


@pytest.mark.parametrize("name", ALPHAS)
def test_wrpo_simpo_is_the_formula_of_the_paper(name, backend, device):
    """-log sigmoid( alpha beta / |y_ws| log pi(y_ws) + (1 - alpha) beta / |y_wt| log pi(y_wt) - ... - gamma )"""
    batch, beta, gamma, a = Batch(device), 10.0, 1.2, alpha_column(ALPHAS[name], device)
    (ws,), wt, rejected = batch.split(batch.exact / batch.length)
    truth = -logsigmoid(a * beta * ws + (1 - a) * beta * wt - beta * rejected - gamma).mean()
    options = {"beta": beta, "gamma": gamma, "length": batch.length, "length_normalize": True, "backend": backend}
    batch.check(truth, alpha=given(ALPHAS[name], device), **options)


@pytest.mark.parametrize("name", ALPHAS)
def test_wrpo_ipo_is_the_formula_of_the_paper(name, backend, device):
    """( alpha D_ws + (1 - alpha) D_wt - D_l - 1 / (2 tau) )^2"""
    batch, tau, a = Batch(device), 0.01, alpha_column(ALPHAS[name], device)
    (ws,), wt, rejected = batch.split(batch.exact - batch.ref_logp.double())
    truth = (a * ws + (1 - a) * wt - rejected - 1 / (2 * tau)).square().mean()
    options = {"beta": tau, "loss_type": "ipo", "backend": backend}
    batch.check(truth, ref_logp=batch.ref_logp, alpha=given(ALPHAS[name], device), **options)


def test_label_smoothing_is_that_of_the_papers_code(backend, device):
    batch, beta, eps = Batch(device), 0.1, 0.2  # alpha is exact in float32: the derivative has a zero nearby
    (ws,), wt, rejected = batch.split(batch.exact - batch.ref_logp.double())
    m = beta * (0.25 * ws + 0.75 * wt - rejected)
    truth = (-(1 - eps) * logsigmoid(m) - eps * logsigmoid(-m)).mean()
    batch.check(truth, ref_logp=batch.ref_logp, alpha=0.25, beta=beta, label_smoothing=eps, backend=backend)


@pytest.mark.parametrize("alpha", ["number", "[B]", "[B, K]"])
def test_several_sources_share_alpha_as_they_are_told(alpha, backend, device):
    """A number and [B] are split evenly; [B, K] is each source's own weight, and the target has what is left."""
    batch, beta = Batch(device, sources=3), 0.05
    own = torch.rand(B, 3, device=device).double()
    own = (own / own.sum(1, keepdim=True) * torch.linspace(0, 1, B, device=device)[:, None]).float()
    value, weights = {
        "number": (0.4, torch.full((B, 3), 0.4 / 3, dtype=torch.float64, device=device)),
        "[B]": (own.sum(1).clamp(max=1), own.sum(1).clamp(max=1).double()[:, None].expand(B, 3) / 3),
        "[B, K]": (own, own.double()),
    }[alpha]
    sources, target, rejected = batch.split(batch.exact - batch.ref_logp.double())
    margin = (weights.T * sources).sum(0) + (1 - weights.sum(1)) * target - rejected
    batch.check(-logsigmoid(beta * margin).mean(), ref_logp=batch.ref_logp, alpha=value, beta=beta, backend=backend)


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize("source", ["ordinary", "not finite"])
def test_alpha_zero_is_dpo_to_the_bit(source, kind, backend, device):
    """-log sigmoid(beta D_wt - beta D_l): the source responses leave no trace, whatever they hold."""
    batch = Batch(device)
    logp = batch.logp.clone()
    if source == "not finite":
        logp[:B] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, -1.0], device=device)
    x, y = logp.requires_grad_(), batch.logp[B:].clone().requires_grad_()
    alpha = 0.0 if kind == "number" else torch.zeros(B, device=device)
    wrpo = wrpo_loss(x, batch.ref_logp, alpha=alpha, beta=0.1, backend=backend)
    dpo = preference_loss(
        y,
        batch.ref_logp[B:],
        seq_weight=torch.tensor([1.0] * B + [-1.0] * B, device=device),
        group=torch.arange(B, device=device).repeat(2),
        beta=0.1,
        backend=backend,
    )
    oracle.assert_same_bits("loss", wrpo.loss, dpo.loss)
    oracle.assert_same_bits("margin", wrpo.margin, dpo.margin)
    wrpo.loss.backward()
    dpo.loss.backward()
    assert not x.grad[:B].any()
    oracle.assert_same_bits("grad", x.grad[B:], y.grad)
    (_, wt, rejected) = batch.split(batch.exact - batch.ref_logp.double())
    truth = -logsigmoid(0.1 * wt - 0.1 * rejected).mean().detach()
    oracle.assert_rule("loss", wrpo.loss, truth, truth, 3 * oracle.ulp(truth, torch.float32))


def test_alpha_one_leaves_the_target_response_out(backend, device):
    batch = Batch(device)
    x = batch.logp.clone()
    x[B : 2 * B] = math.nan
    x.requires_grad_()
    out = wrpo_loss(x, batch.ref_logp, alpha=1.0, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert not x.grad[B : 2 * B].any()


def test_a_source_of_weight_zero_pads_the_batch(backend, device):
    """Rows with fewer sources than the batch: the third source of all examples weighs nothing."""
    two, three = Batch(device, sources=2), Batch(device, sources=3)
    rows = three.logp.view(-1, B)
    rows[:2], rows[3:] = two.logp.view(-1, B)[:2], two.logp.view(-1, B)[2:]
    refs, two_refs = three.ref_logp.view(-1, B), two.ref_logp.view(-1, B)
    refs[:2], refs[3:] = two_refs[:2], two_refs[2:]
    weights = torch.tensor([[0.1, 0.3]] * B, device=device)
    padded = torch.cat([weights, torch.zeros(B, 1, device=device)], 1)
    a = wrpo_loss(two.logp, two.ref_logp, alpha=weights, num_sources=2, backend=backend)
    b = wrpo_loss(three.logp, three.ref_logp, alpha=padded, num_sources=3, backend=backend)
    oracle.assert_same_bits("loss", b.loss, a.loss)
    oracle.assert_same_bits("margin", b.margin, a.margin)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.37, 1.0])
def test_step_0_gives_log_2_exactly(alpha, backend, device):
    batch = Batch(device)
    out = wrpo_loss(batch.logp, batch.logp.clone(), alpha=alpha, backend=backend)
    assert float(out.loss) == float(torch.tensor(math.log(2.0)))
    assert not out.reward.any()


def test_rewards_and_margins_are_in_the_layout_of_the_input(backend, device):
    batch = Batch(device)
    out = wrpo_loss(batch.logp, batch.ref_logp, alpha=0.25, beta=0.5, backend=backend)
    reward = 0.5 * (batch.logp.double() - batch.ref_logp.double())
    oracle.assert_rule("reward", out.reward, reward, reward, oracle.ulp(reward, torch.float32))
    (ws,), wt, rejected = batch.split(reward)
    margin = 0.25 * ws + 0.75 * wt - rejected
    oracle.assert_rule("margin", out.margin, margin, margin, oracle.ulp(margin, torch.float32))


def test_the_default_beta_is_the_papers(backend, device):
    batch = Batch(device)
    a = wrpo_loss(batch.logp, batch.ref_logp, alpha=0.1, backend=backend)
    b = wrpo_loss(batch.logp, batch.ref_logp, alpha=0.1, beta=0.01, backend=backend)
    oracle.assert_same_bits("loss", a.loss, b.loss)


REFUSED = {
    "negative alpha": ({"alpha": -0.1}, ValueError, "alpha.*-0.1"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, r"alpha.*\[0, 1\].*1.5"),
    "NaN alpha": ({"alpha": math.nan}, ValueError, "alpha.*nan"),
    "alpha as text": ({"alpha": "0.1"}, TypeError, "alpha.*str"),
    "alpha a list": ({"alpha": [0.1, 0.2]}, TypeError, "alpha.*list"),
    "no alpha": ({"alpha": None}, TypeError, "alpha.*NoneType"),
    "NaN in alpha": ({"alpha": torch.tensor([0.1, math.nan])}, ValueError, "alpha.*nan"),
    "complex alpha": ({"alpha": torch.tensor(0.5 + 0.9j)}, ValueError, "alpha.*real.*complex64"),
    "alpha tensor true": ({"alpha": torch.tensor(True)}, ValueError, "alpha.*real.*bool"),
    "alpha tensor above 1": ({"alpha": torch.tensor(1.5)}, ValueError, r"alpha.*\[0, 1\].*1.5"),
    "alpha of another shape": ({"alpha": torch.zeros(3)}, ValueError, r"alpha.*\[B\] = \[2\].*\[3\]"),
    "alpha [K, B]": (
        {"alpha": torch.zeros(3, 2), "logp": torch.zeros(10), "num_sources": 3},
        ValueError,
        r"alpha.*\[B, K\] = \[2, 3\].*\[3, 2\]",
    ),
    "alpha of sum above 1": (
        {"alpha": torch.full((2, 2), 0.7), "logp": torch.zeros(8), "num_sources": 2},
        ValueError,
        "alpha.*sum.*1",
    ),
    "alpha that wants a gradient": (
        {"alpha": torch.tensor(0.1, requires_grad=True)},
        ValueError,
        "alpha.*requires grad",
    ),
    "S no multiple of 3": ({"logp": torch.zeros(7)}, ValueError, r"num_sources \+ 2.*7"),
    "S no multiple of K + 2": ({"num_sources": 2}, ValueError, r"num_sources \+ 2.*4.*6"),
    "no source": ({"num_sources": 0}, ValueError, "num_sources.*>= 1.*0"),
    "num_sources a fraction": ({"num_sources": 1.0}, (ValueError, TypeError), "num_sources.*int.*1.0"),
    "logp a list": ({"logp": [0.0] * 6}, TypeError, "logp.*list"),
    "scalar logp": ({"logp": torch.tensor(0.0)}, ValueError, r"logp.*\[S\].*\[\]"),
    "ref_logp that wants a gradient": (
        {"ref_logp": torch.zeros(6, requires_grad=True)},
        ValueError,
        "ref_logp.*requires grad",
    ),
    "beta 0": ({"beta": 0.0}, ValueError, "beta.*> 0"),
    "simpo as a loss type": ({"loss_type": "simpo"}, ValueError, "loss_type.*'simpo'"),
    "an option that does not exist": ({"betta": 0.1}, TypeError, "betta"),
    "weights that the layout makes": ({"seq_weight": torch.ones(6)}, TypeError, "seq_weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_named_in_the_error(name):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        wrpo_loss(**{"logp": torch.zeros(6), "alpha": 0.1, **changes})


LINEAR = {"hidden": torch.zeros(6, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(6, 3).long(), "alpha": 0.1}
LINEAR_REFUSED = {
    "NaN alpha": ({"alpha": math.nan}, ValueError, "alpha.*nan"),
    "alpha of another shape": ({"alpha": torch.zeros(3)}, ValueError, r"alpha.*\[B\] = \[2\].*\[3\]"),
    "S no multiple of 3": ({"hidden": torch.zeros(7, 3, 4), "labels": torch.zeros(7, 3).long()}, ValueError, "7"),
    "labels a list": ({"labels": [[0]]}, TypeError, "labels.*list"),
    "scalar labels": ({"labels": torch.tensor(0)}, ValueError, "labels"),
    "hidden a list": ({"hidden": [[0.0]]}, TypeError, "hidden.*list"),
    "cu_seqlens a list": ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens.*list"),
    "scalar cu_seqlens": ({"cu_seqlens": torch.tensor(3)}, ValueError, r"cu_seqlens.*\[S\+1\].*\[\]"),
}


@pytest.mark.parametrize("name", LINEAR_REFUSED)
def test_a_wrong_argument_of_the_linear_form_is_named_in_the_error(name):
    changes, error, message = LINEAR_REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        linear_wrpo_loss(**{**LINEAR, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_stay_on_their_device_whatever_the_default_device_is(dtype):
    hidden = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    weight, labels, ref_logp = torch.randn(11, 8, dtype=dtype), torch.randint(0, 11, (3, 4)), torch.zeros(3)
    with torch.device("meta"):  # stands for a default device without which there would be nothing to notice
        loss = linear_wrpo_loss(hidden, weight, labels, ref_logp, alpha=0.1, budget_bytes=1).loss
        loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("form", ["log-probs", "hidden states"])
def test_a_new_batch_size_or_alpha_does_not_compile_again(form, dynamic):
    """The last batch of an epoch is smaller, and alpha is another number at every step."""

    def loss(alpha: float, ref_logp: Tensor, *tensors: Tensor) -> Tensor:
        door = wrpo_loss if form == "log-probs" else linear_wrpo_loss
        return door(*tensors, ref_logp, alpha=alpha).loss

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    for step in range(12):
        size = 3 * (2, 2, 5, 3, 7, 11)[step % 6]
        tensors = [torch.randn(size, 4, 8), torch.randn(23, 8), torch.randint(0, 23, (size, 4))]
        tensors = [torch.randn(size)] if form == "log-probs" else tensors
        tensors[0].requires_grad_()
        given = (0.01 * step, torch.randn(size), *tensors)
        got, expected = compiled(*given), loss(*given)
        oracle.assert_same_bits("loss", got, expected)
        oracle.assert_same_bits("grad", *(torch.autograd.grad(y, tensors[0])[0] for y in (got, expected)))
    assert counter.frame_count <= 3  # as it is, with another alpha, with another size


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_compiled_a_wrong_alpha_of_the_host_is_still_refused(kind):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, a: wrpo_loss(x, alpha=a).loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="alpha"):
        compiled(torch.zeros(6), 1.5 if kind == "number" else torch.zeros(3))
