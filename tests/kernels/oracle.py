"""The truth, and how far from it a result may be.

The truth is float64 torch, written from the mathematics alone: whole logits, `log_softmax`, autograd. It starts from
the inputs as the op sees them, already rounded to the tested dtype. `plain` is what a user of torch would write in
that dtype, with the log-softmax in float32 (the stricter of the two habits).

The rule, element by element:

    |got - truth| <= |plain - truth| + slack          slack: a sum of k ulp, each k with its reason below

Plain torch can hit the truth by luck in an element, so the slack alone has to cover the roundings that any
implementation in this dtype must make. It is a worst case, so a second rule guards the typical case (`rms`: at most
twice plain's) and a third the sign (`gain`, `mean`: errors must not lean to one side).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Roundings in float32 from a logit to its log-probability, in half ulps: bias, scale, division by the cap, tanh (two),
# cap, temperature, exp (two), log, the sum of max and log: 11. Those before exp are of the largest score if anything is
# done to the scores; else only differences of them are rounded, and an offset of all costs nothing. A sum of V
# positive terms adds the random walk of its lanes, sqrt(V / 16) / 2 half ulps at worst; for V = 262144 that is 64
# halves of ulp(1).
ROW_ULPS = 6.0
# A dot product of K terms in float32 walks sqrt(K) half ulps of its partial sums, which stay well below the sum of
# absolute terms that this multiplies; 4 covers K = 64 even if all partial sums were as large as that.
DOT_ULPS = 4.0


class Transform(NamedTuple):
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        return abs(self.logit_scale) / self.temperature

    def __call__(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """The head's post-processing in the dtype of `scores`, in the order of the models."""
        z = scores if bias is None else scores + bias
        z = z * self.logit_scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature


class Truth(NamedTuple):
    """What a problem's results should be. Names of gradients: "logits", or "hidden" and "weight"; and "bias"."""

    logp: Tensor  # [N] float64
    grads: dict[str, Tensor]  # float64
    slack: dict[str, Tensor]  # float64, of "logp" and of each gradient


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of `dtype` at |value|, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.double().abs().clamp(info.tiny, info.max))
    return info.eps * torch.exp2((exponent - 1).double())


def pick(z: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """log p of each target from scores [..., V], 0 where ignored, in the dtype of the scores."""
    counts = target != ignore_index
    logp = torch.log_softmax(z, -1).gather(-1, target.where(counts, 0)[..., None])[..., 0]
    return logp.where(counts, 0.0)


def row_slack(z: Tensor, logit_error: Tensor, transform: Transform) -> Tensor:
    """Error of a score and of the log-sum-exp beneath it [N, V]: what the logits carry, and the float32 arithmetic."""
    finite = z.where(z.isfinite(), 0.0)
    if transform == Transform():
        size = finite.amax(-1, keepdim=True) - finite
    else:
        size = finite.abs().amax(-1, keepdim=True).clamp(min=(transform.softcap or 0.0) / transform.temperature)
    walk = math.sqrt(z.shape[-1] / 16) / 4 * torch.finfo(torch.float32).eps
    return logit_error * transform.slope + ROW_ULPS * ulp(size.clamp(min=1.0), torch.float32) + walk


class Row(NamedTuple):
    """Size and worst error of `delta = d logp / d logits` [N, V], before any coefficient."""

    size: Tensor
    error: Tensor


def delta_slack(
    z: Tensor, target: Tensor, error: Tensor, transform: Transform, ignore_index: int
) -> tuple[Tensor, Row]:
    """The slack of logp [N], and what `delta` may be off by in float32 arithmetic."""
    counts = (target != ignore_index)[:, None]
    p = torch.softmax(z, -1)
    onehot = torch.zeros_like(p).scatter_(1, target[:, None].where(counts, 0), 1.0)
    row_error = error + (p * error).sum(-1, keepdim=True)  # of z_v - lse
    logp_slack = (row_error * onehot).sum(-1).where(counts[:, 0], 0.0)
    size = ((onehot - p).abs() * transform.slope).where(counts, 0.0)
    # `1 - tanh^2` cancels, and so does plain torch's `1 - p`, so the float32 error is one of (onehot + p), not of
    # delta. Where p is no normal float32 number it may be 0.
    float32 = torch.finfo(torch.float32)
    lost = (p * row_error + ROW_ULPS * float32.eps * (onehot + p) + float32.tiny) * transform.slope
    if transform.softcap:
        lost = lost + 2 * size * row_error * transform.temperature / transform.softcap  # the bend is read from z
    return logp_slack.nan_to_num(), Row(size.nan_to_num(), lost.where(counts, 0.0).nan_to_num())


def token_logp_truth(
    logits: Tensor, target: Tensor, grad_logp: Tensor, transform: Transform, ignore_index: int = -100
) -> Truth:
    x = logits.detach().double().requires_grad_()
    bias = None if transform.bias is None else transform.bias.detach().double().requires_grad_()
    z = transform(x, bias)
    logp = pick(z, target, ignore_index)
    wanted = {"logits": x} | ({} if bias is None else {"bias": bias})
    grads = gradients(logp, wanted, grad_logp)
    rows, flat = z.detach().reshape(-1, z.shape[-1]), target.reshape(-1)
    error = row_slack(rows, torch.zeros_like(rows), transform)
    logp_slack, delta = delta_slack(rows, flat, error, transform, ignore_index)
    c = grad_logp.double().abs().reshape(-1, 1)
    # One rounding of the gradient to the dtype of the logits (half an ulp, one where a library rounds c * delta twice).
    slack = {
        "logp": logp_slack.reshape(target.shape),
        "logits": (c * delta.error).reshape(logits.shape) + ulp(grads["logits"], logits.dtype),
    }
    if bias is not None:
        slack["bias"] = sum_slack(c * delta.size, c * delta.error, logits.dtype) + ulp(
            grads["bias"], transform.bias.dtype
        )
    return Truth(logp.detach(), grads, slack)


def sum_slack(size: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a sum over rows of terms that were rounded to `dtype` first."""
    return (error + 0.5 * torch.finfo(dtype).eps * size + DOT_ULPS * torch.finfo(torch.float32).eps * size).sum(0)


def linear_truth(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_logp: Tensor,
    transform: Transform,
    ignore_index: int = -100,
    passes: int = 1,
    partial: Tensor | None = None,
) -> Truth:
    """The matrix products run in the dtype of `hidden`; those of dW in as many parts as there are `passes`. Where the
    scores are added up from two products, `partial` [..., V] is the first, which is rounded before the second."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    bias = None if transform.bias is None else transform.bias.detach().double().requires_grad_()
    raw = h @ w.T
    logp = pick(transform(raw, bias), target, ignore_index)
    wanted = {"hidden": h, "weight": w} | ({} if bias is None else {"bias": bias})
    grads = gradients(logp, wanted, grad_logp)
    with torch.no_grad():
        slack = linear_slack(
            h, w, raw, bias, target, grad_logp, transform, ignore_index, passes, hidden.dtype, grads, partial
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", transform.bias)):
        if tensor is not None:
            slack[name] = slack[name] + 0.5 * ulp(grads[name], tensor.dtype)
    return Truth(logp.detach(), grads, slack)


def linear_slack(
    h, w, raw, bias, target, grad_logp, transform, ignore_index, passes, compute, grads, partial
) -> dict[str, Tensor]:
    """Rounding, in the order in which it happens on the way through a head whose products run in `compute`."""
    eps32 = torch.finfo(torch.float32).eps
    width, vocabulary = h.shape[-1], w.shape[0]
    h, raw, target, c = h.reshape(-1, width), raw.reshape(-1, vocabulary), target.reshape(-1), grad_logp.reshape(-1, 1)
    c, size_h, size_w = c.double().abs(), h.abs(), w.abs()
    counts = (target != ignore_index)[:, None]
    size_h = size_h.where(counts, 0.0)  # ignored rows may hold anything
    # 1. The product is summed in float32 and rounded to `compute`.
    logit_error = 0.5 * ulp(raw, compute) + DOT_ULPS * eps32 * (size_h @ size_w.T)
    if partial is not None:
        logit_error = logit_error + 0.5 * ulp(partial.reshape(-1, vocabulary), compute)
    z = transform(raw, bias)
    logp_slack, delta = delta_slack(z, target, row_slack(z, logit_error, transform), transform, ignore_index)
    # 2. delta is rounded to `compute` (half an ulp) before the second and third product.
    delta_error = delta.error + 0.5 * ulp(delta.size, compute) * (delta.size > 0)
    # 3. dh: the product is rounded, then its product with c is: two half ulps. Its dot product is over V.
    grad_hidden = c * (delta_error @ size_w + DOT_ULPS * eps32 * (delta.size @ size_w)) + ulp(
        grads["hidden"].reshape(-1, width), compute
    )
    # 4. dW: c h is rounded once (half an ulp); db: c is. A CPU product of 16-bit matrices is rounded to 16 bits, so
    # with several passes each share is (half an ulp, which a sum of absolute terms bounds for all shares together).
    c = c.where(counts, 0.0)
    share = 0.5 * torch.finfo(compute).eps if passes > 1 else 0.0
    smallest = 0.5 * passes * torch.finfo(compute).tiny * torch.finfo(compute).eps
    terms = c * (delta_error + (DOT_ULPS * eps32 + share) * delta.size)
    return {
        "logp": logp_slack.reshape(grad_logp.shape),
        "hidden": grad_hidden.where(counts, 0.0).reshape(grads["hidden"].shape),
        "weight": terms.T @ size_h + delta.size.T @ (0.5 * ulp(c * size_h, compute)) + smallest,
        "bias": (terms + 0.5 * ulp(c, compute) * delta.size).sum(0),
    }


def gradients(logp: Tensor, wanted: Mapping[str, Tensor], grad_logp: Tensor) -> dict[str, Tensor]:
    values = torch.autograd.grad(logp, list(wanted.values()), grad_logp.to(logp.dtype))
    return dict(zip(wanted, values, strict=True))


def plain_token_logp(logits: Tensor, target: Tensor, transform: Transform, ignore_index: int = -100) -> Tensor:
    bias = None if transform.bias is None else transform.bias.float()
    return pick(transform(logits.float(), bias), target, ignore_index)


def plain_linear_token_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, transform: Transform, ignore_index: int = -100
) -> Tensor:
    return plain_token_logp(hidden @ weight.to(hidden.dtype).T, target, transform, ignore_index)


def assert_rule(name: str, got: Tensor, truth: Tensor, plain: Tensor, slack: Tensor) -> None:
    """The rule at the top of this file, with the worst element in the message."""
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}"
    got64, plain64 = got.detach().double(), plain.detach().double()
    same = (got64 == truth) | (got64.isnan() & truth.isnan())  # infinities and NaN agree or fail
    error = torch.where(same, 0.0, (got64 - truth).abs()).nan_to_num(nan=math.inf)
    plain_error = torch.where(plain64 == truth, 0.0, (plain64 - truth).abs()).nan_to_num(nan=0.0, posinf=0.0)
    excess = error - (plain_error + slack)
    if bool((excess > 0).any()):
        index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}{list(index)}: got {got64[index]:.9g}, truth {truth[index]:.9g}, plain {plain64[index]:.9g}; error "
            f"{error[index]:.3g} > plain's {plain_error[index]:.3g} + slack {slack[index]:.3g}; "
            f"{int((excess > 0).sum())} of {excess.numel()} elements fail"
        )


def assert_typical(name: str, got: Tensor, truth: Tensor, plain: Tensor, floor: float = 0.0) -> None:
    """Root mean square error at most twice plain's: of three roundings of equal size plain makes at least one, and
    sqrt(3) < 2. `floor`: what else an implementation may lose."""
    rms, plain_rms = (float((x.detach().double() - truth).square().mean().sqrt()) for x in (got, plain))
    allowed = 2 * plain_rms + floor
    assert rms <= allowed, f"{name}: rms error {rms:.3g}, allowed {allowed:.3g} (plain torch {plain_rms:.3g})"


def assert_unbiased(name: str, got: Tensor, truth: Tensor, plain: Tensor, floor: float) -> None:
    """Errors lean to neither side: not in the mean, nor along the truth (a gain that is off by a part).

    Independent errors average out as 1 / sqrt(n); 5 standard deviations. Errors that all share (of one log-sum-exp)
    do not, but then plain has them too. `floor`: a systematic part of an ulp is no bias that anyone could train on.
    """
    error, plain_error = (x.detach().double() - truth for x in (got, plain))
    for what, direction in (("mean", torch.ones_like(truth)), ("gain", truth)):
        norm = direction.square().sum().clamp(min=1e-300)
        shift, plain_shift = (float((e * direction).sum() / norm) for e in (error, plain_error))
        spread = float((error * direction).square().sum().sqrt() / norm)
        size = 1.0 if what == "gain" else float(truth.square().mean().sqrt())
        allowed = abs(plain_shift) + 5 * spread + floor * size
        assert abs(shift) <= allowed, (
            f"{name}: {what} of errors {shift:.3g}, allowed {allowed:.3g} (plain {plain_shift:.3g})"
        )


def assert_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, name
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = got.detach().contiguous().view(kind) != expected.detach().contiguous().view(kind)
    assert not different.any(), f"{name}: {int(different.sum())} of {different.numel()} elements differ in their bits"


class Preference(NamedTuple):
    loss: Tensor  # [G], before any reduction
    reward: Tensor  # [S]
    margin: Tensor  # [G]


def preference_truth(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    seq_weight: Tensor,
    group: Tensor,
    num_groups: int,
    beta: float | Tensor,
    gamma: float | Tensor = 0.0,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    length: Tensor | None = None,
    length_normalize: bool = False,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
) -> Preference:
    """The family of losses, one sequence and one group at a time, in float64; differentiable in `logp` [S]."""
    logp = logp.double()
    betas, gammas = (torch.as_tensor(v, dtype=torch.float64).expand(num_groups).tolist() for v in (beta, gamma))
    rewards, margins, losses = [], [-gamma for gamma in gammas], [0.0] * num_groups
    for s, g in enumerate(group.tolist()):
        scale = 1.0 / int(length[s]) if length_normalize else 1.0
        ratio = logp[s] if ref_logp is None else logp[s] - ref_logp[s].double()
        rewards.append(betas[g] * scale * ratio)
        margins[g] = margins[g] + seq_weight[s].double() * rewards[s]
        nll = nll_weight[s].double() if isinstance(nll_weight, Tensor) else nll_weight
        losses[g] = losses[g] - nll * scale * logp[s]
    for g, margin in enumerate(margins):
        m = torch.as_tensor(margin, dtype=torch.float64, device=logp.device)
        loss = loss_of_margin(m, betas[g], loss_type, label_smoothing, discopop_tau)
        losses[g] = losses[g] + (1.0 if group_weight is None else group_weight[g].double()) * loss
        margins[g] = m
    return Preference(*(torch.stack(values) if values else logp[:0] for values in (losses, rewards, margins)))


def loss_of_margin(m: Tensor, beta: float, loss_type: str, eps: float, tau: float) -> Tensor:
    """As the papers write them, in float64."""
    right, wrong = torch.nn.functional.logsigmoid(m), torch.nn.functional.logsigmoid(-m)
    if loss_type == "hinge":
        return torch.relu(1 - m)
    if loss_type == "ipo":
        return (m / beta - 1 / (2 * beta)) ** 2
    if loss_type == "robust":
        return (-(1 - eps) * right + eps * wrong) / (1 - 2 * eps)
    if loss_type == "exo_pair":
        return right.exp() * (right - math.log(1 - eps)) + wrong.exp() * (wrong - math.log(eps))
    if loss_type == "discopop":
        t = torch.sigmoid(m / tau)
        return -right * (1 - t) + (torch.nn.functional.logsigmoid(m / tau) - m).exp()
    if loss_type == "kto":
        return wrong.exp()  # the derivative of a sigmoid near 1 would cancel
    return -(1 - eps) * right - eps * wrong
