"""The ops' values and gradients in float64, written out by hand, and what rounding can make of each.

    z_nv     = cap tanh(scale (h_n W_v + b_v) / cap) / temperature          logp_n = z_n,y - log sum_v exp z_nv
    delta_nv = d logp_n / d (h_n W_v)                                       = (1[v = y] - p_nv) dz_nv
    r_s = beta n_s (l_s - rho_s)     m_g = sum_s w_s r_s - gamma            loss_g = a_g phi(m_g) - sum_s nll_s n_s l_s
    c_s = d loss_g / d l_s = a_g phi'(m_g) beta w_s n_s - nll_s n_s

No autograd, no `log_softmax`, nothing of `oracle` or of the kernels: a mistake would have to be made twice. With each
value goes a bound of its error, to first order, for products in the compute type and float32 arithmetic elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
STEPS = 16 * EPS  # roundings from a logit to its log-prob, relative to the largest score
DOT = 4 * EPS  # of a sum, relative to that of its absolute terms


class Bounded(NamedTuple):
    """A value and what a result may differ from it, float64 both."""

    value: Tensor
    error: Tensor

    def reshape(self, shape: torch.Size) -> Bounded:
        return Bounded(self.value.reshape(shape), self.error.reshape(shape))

    def rounded(self, dtype: torch.dtype) -> Bounded:
        info = torch.finfo(dtype)
        return Bounded(self.value, self.error + info.eps * self.value.abs() + info.tiny * info.eps)


def exact(x: Tensor) -> Bounded:
    return Bounded(x.double(), torch.zeros(x.shape, dtype=torch.float64))


def times(a: Bounded, b: Tensor, rounding: float) -> Bounded:
    """a b for an exact b, whose terms are rounded by that much of their size."""
    return Bounded(a.value @ b, a.error @ b.abs() + rounding * (a.value.abs() @ b.abs()))


class Scores(NamedTuple):
    """Of logits [N, V] before bias, scale, cap and temperature."""

    z: Tensor  # [N, V]
    lse: Tensor  # [N, 1]
    p: Tensor  # [N, V]
    slope: Tensor  # [N, V] dz by the logit
    error: Tensor  # [N, 1] of z
    wrong: Tensor  # [N, V] of p
    bent: float  # of the slope, by the error of z


def scores(raw: Bounded, head: dict[str, Any]) -> Scores:
    scale, cap, temperature = head["logit_scale"], head["softcap"], head["temperature"]
    bias = head.get("bias")
    y = scale * (raw.value if bias is None else raw.value + bias.double())
    bend = torch.zeros_like(y)  # tanh
    if cap:
        bend = torch.tanh(y / cap)
        y = cap * bend
    z = y / temperature
    top = z.amax(1, keepdim=True)
    power = torch.exp(z - top)
    total = power.sum(1, keepdim=True)
    # Of z, beside what the logits carry: the largest number that is rounded on the way, and a walk over the sum.
    finite = z.where(z.isfinite(), 0.0)
    size = (finite.abs().amax(1, keepdim=True) + total.log()).clamp(min=max(1.0, (cap or 0.0) / temperature))
    error = abs(scale) / temperature * raw.error + STEPS * size + EPS * z.shape[1] ** 0.5 / 8
    wrong = (power / total * torch.expm1(2 * error)).clamp(max=1.0)
    bent = 2 * abs(scale) / cap if cap else 0.0
    return Scores(z, top + total.log(), power / total, (1 - bend**2) * scale / temperature, error, wrong, bent)


class Rows(NamedTuple):
    logp: Bounded  # [N]
    delta: Bounded  # [N, V]


def rows(raw: Bounded, target: Tensor, counts: Tensor, head: dict[str, Any], stored: torch.dtype) -> Rows:
    """Of logits [N, V] before bias, scale, cap and temperature; delta is stored in a type of fewer bits."""
    z, lse, p, slope, error, wrong, bent = scores(raw, head)
    hit = torch.arange(z.shape[1]) == target[:, None]
    logp = (z - lse).where(hit, 0.0).sum(1)
    lost = slope.abs() * (wrong + STEPS * (hit + p) + torch.finfo(torch.float32).tiny)
    lost = lost + (hit + p) * bent * error
    keep = counts[:, None]
    delta = ((hit.double() - p) * slope).where(keep, 0.0)
    return Rows(
        Bounded(logp.where(counts, 0.0), (2 * error[:, 0]).where(counts, 0.0)),
        Bounded(delta, lost.where(keep, 0.0)).rounded(stored),
    )


class Statistics(NamedTuple):
    values: dict[str, Bounded]  # [N] each
    delta: Bounded  # [N, V], of sum_k coef[n, k] value_k[n] by the logits


def statistics(
    raw: Bounded, target: Tensor, counts: Tensor, head: dict[str, Any], coef: dict[str, Tensor], stored: torch.dtype
) -> Statistics:
    """With S = sum_v p_v^2 and H the entropy

    d H / dz_v = -p_v (log p_v + H)      d log S / dz_v = 2 p_v (p_v / S - 1)      d lse / dz_v = p_v
    """
    z, lse, p, slope, error, wrong, bent = scores(raw, head)
    log_p = (z - lse).where(p > 0, 0.0)
    twice = torch.expm1(2 * error)  # relative error of p
    entropy, squares = -(p * log_p).sum(1, keepdim=True), p.square().sum(1, keepdim=True)
    of_entropy = (p * (log_p.abs() + 1)).sum(1, keepdim=True) * twice + STEPS * (1 + entropy)
    of_squares = 2 * twice + STEPS * (1 - squares.log())
    values = {
        "lse": Bounded(lse, error),
        "entropy": Bounded(entropy, of_entropy),
        "mean_logits": Bounded(z.mean(1, keepdim=True), error + DOT * z.abs().mean(1, keepdim=True)),
        "log_sum_sq_probs": Bounded(squares.log(), of_squares),
    }
    kept = {name: Bounded(*(x[:, 0].where(counts, 0.0) for x in value)) for name, value in values.items()}
    hit = (torch.arange(z.shape[1]) == target[:, None]).double()
    kept["logp"] = rows(raw, target, counts, head, stored).logp
    c = {name: value.double()[:, None] for name, value in coef.items()}
    inner = c["lse"] - c["logp"] - c["entropy"] * (log_p + entropy) + 2 * c["log_sum_sq_probs"] * (p / squares - 1)
    value = c["logp"] * hit + p * inner + c["mean_logits"] / z.shape[1]
    # What is added up for an element, by its size, and how wrong the parts of `inner` are.
    a = {name: part.abs() for name, part in c.items()}
    size = a["lse"] + a["logp"] + a["entropy"] * (log_p.abs() + entropy) + 2 * a["log_sum_sq_probs"] * (p / squares + 1)
    of_inner = a["entropy"] * (2 * error + of_entropy) + 2 * a["log_sum_sq_probs"] * p / squares * (twice + of_squares)
    size = p * size + a["logp"] * hit + a["mean_logits"] / z.shape[1]
    lost = wrong * inner.abs() + p * of_inner + STEPS * size + torch.finfo(torch.float32).tiny * sum(a.values())
    keep = counts[:, None]
    delta = Bounded(value * slope, lost * slope.abs() + size * bent * error)
    return Statistics(
        {name: value.rounded(torch.float32) for name, value in kept.items()},
        Bounded(*(x.where(keep, 0.0) for x in delta)).rounded(stored),
    )


def logits(
    hidden: Tensor, weight: Tensor, adapter: tuple[Tensor, Tensor] | None, dtype: torch.dtype | None = None
) -> Bounded:
    """h W^T + low up^T [N, V], each product rounded to the type of the hidden states, or to a wider one: of what the
    first rounds away a second rounding is left."""
    compute = hidden.dtype
    info, kept = torch.finfo(compute), dtype or compute

    def product(left: Tensor, right: Tensor) -> Bounded:
        found = times(exact(left), right.T, DOT)
        if kept == compute:
            return found.rounded(compute)
        second = info.eps**2 * found.value.abs() + info.tiny * info.eps
        return Bounded(found.value, found.error + second).rounded(kept)

    raw = product(hidden, weight.to(compute).double())
    if adapter is not None:
        more = product(*(part.to(compute).double() for part in adapter))
        raw = Bounded(raw.value + more.value, raw.error + more.error).rounded(kept)
    return Bounded(raw.value, raw.error.amax(1, keepdim=True))


def head_gradients(
    c: Bounded, delta: Bounded, hidden: Tensor, weight: Tensor, adapter: tuple[Tensor, Tensor] | None
) -> dict[str, Bounded]:
    """Of the sum of c_n logp_n; ignored rows of `hidden` may hold anything."""
    compute = hidden.dtype
    rounding = DOT + 2 * torch.finfo(compute).eps
    c = Bounded(c.value[:, None], c.error[:, None])
    scaled = Bounded(c.value * delta.value, c.value.abs() * delta.error + c.error * delta.value.abs())
    inputs = {"hidden": hidden} | ({} if adapter is None else {"low": adapter[0].to(compute)})
    matrices = {"hidden": weight.to(compute)} | ({} if adapter is None else {"low": adapter[1].to(compute)})
    names = {"hidden": "weight", "low": "up"}
    found = {"bias": Bounded(scaled.value.sum(0), scaled.error.sum(0) + rounding * scaled.value.abs().sum(0))}
    turned = Bounded(scaled.value.T, scaled.error.T)
    least = torch.finfo(compute).tiny * torch.finfo(compute).eps  # what a product of a 16-bit type can lose
    counted = (c.value != 0) | (c.error != 0)
    for name, x in inputs.items():
        value = times(scaled, matrices[name].double(), rounding)
        # The product is rounded before c joins it, and after.
        found[name] = Bounded(value.value, value.error + c.value.abs() * least * delta.value.shape[1]).rounded(compute)
        value = times(turned, x.double().where(counted, 0.0), rounding)
        # The rows are rounded with c, and a sum of every chunk of them, which may be one row.
        lost = least * (delta.value.abs().sum(0)[:, None] + int(counted.sum()))
        found[names[name]] = Bounded(value.value, value.error + lost)
    return found


class Preferences(NamedTuple):
    loss: Bounded  # [G]
    reward: Bounded  # [S]
    margin: Bounded  # [G]
    coef: Bounded  # [S]
    num_counted: int  # groups that count in a mean


def preferences(logp: Bounded, ref_logp: Tensor | None, length: Tensor, o: dict[str, Any]) -> Preferences:
    """`o`: the options of `preference_loss`, all of them there; length [S] is exact."""
    group, num_groups = o["group"], o["num_groups"]
    wide = {"dtype": torch.float64}
    beta_of_group, gamma = (torch.as_tensor(o[name], **wide).expand(num_groups) for name in ("beta", "gamma"))
    beta = beta_of_group[group]
    n = torch.ones(len(group), dtype=torch.float64)
    if o["length_normalize"]:
        n = torch.where(length > 0, 1.0 / length.clamp(min=1), 0.0).double()
    weight = o["seq_weight"].double()
    nll = o["nll_weight"].double() if isinstance(o["nll_weight"], Tensor) else torch.full_like(n, o["nll_weight"])
    a = torch.ones(num_groups, dtype=torch.float64) if o["group_weight"] is None else o["group_weight"].double()
    full = torch.ones(num_groups, dtype=torch.bool)
    if o["empty"] == "zero":
        full[group[length == 0]] = False
        a, nll = a * full, nll * full[group]

    def by_group(values: Tensor) -> Tensor:
        return torch.zeros(num_groups, dtype=torch.float64).index_add(0, group, values)

    reward = beta * n * (logp.value - (0.0 if ref_logp is None else ref_logp.double()))
    reward_error = beta * n * logp.error + EPS * reward.abs()
    margin = by_group(weight * reward) - gamma
    margin_error = by_group(weight.abs() * (beta * n * logp.error + EPS * reward.abs())) + EPS * margin.abs()
    loss, slope, bend = phi(margin, margin_error, beta_of_group, o)
    loss_error = a.abs() * (slope.abs() * margin_error + bend * margin_error**2)
    loss_error = loss_error + by_group(nll.abs() * n * logp.error)
    size = (a * loss).abs() + by_group((nll * n * logp.value).abs())
    loss = a * loss - by_group(nll * n * logp.value)
    coef = (a * slope)[group] * beta * weight * n - nll * n
    coef_error = (a.abs() * bend * margin_error)[group] * beta * weight.abs() * n
    coef_error = coef_error + 4 * EPS * ((a * slope)[group] * beta * weight * n).abs() + 4 * EPS * (nll * n).abs()
    return Preferences(
        Bounded(loss, loss_error + EPS * size),
        Bounded(reward, reward_error),
        Bounded(margin, margin_error),
        Bounded(coef, coef_error),
        max(int(full.sum()), 1),
    )


def phi(margin: Tensor, error: Tensor, beta: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a margin, its slope, and how fast that can change within the error."""
    if o["loss_type"] == "hinge":
        kink = (margin - 1).abs() <= 4 * error  # here the slope is -1 or 0
        return (1 - margin).clamp(min=0), -(margin < 1).double(), torch.where(kink, 1 / error.clamp(min=1e-300), 0.0)
    if o["loss_type"] == "ipo":
        distance = margin - 0.5
        return (distance / beta) ** 2, 2 * distance / beta**2, 2 / beta**2
    eps = o["label_smoothing"]
    lower = 1 / (1 + torch.exp(margin))  # sigmoid(-m)
    softplus = torch.log1p(torch.exp(-margin.abs())) + (-margin).clamp(min=0)  # -log sigmoid(m)
    if o["loss_type"] == "kto":
        return lower, -lower * (1 - lower), torch.full_like(margin, 0.1)  # of the slope at most sqrt(3) / 18
    if o["loss_type"] == "exo_pair":
        logit = math.log((1 - eps) / eps)
        value = (1 - lower) * (-softplus - math.log(1 - eps)) + lower * (-softplus - margin - math.log(eps))
        return value, lower * (1 - lower) * (margin - logit), 0.25 + 0.1 * (margin - logit).abs()
    if o["loss_type"] == "discopop":
        return discopop(margin, softplus, lower, o["discopop_tau"])
    if o["loss_type"] == "robust":
        eps = -eps / (1 - 2 * eps)
    return softplus + eps * margin, eps - lower, torch.full_like(margin, 0.25)


def discopop(margin: Tensor, softplus: Tensor, lower: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of tau < 1. Both losses are below 1 + |m| where the other one's share is not negligible."""
    share = 1 / (1 + torch.exp(-margin / tau))  # of the exponential loss
    powered = torch.exp(-margin - torch.log1p(torch.exp(-margin.abs() / tau)) + margin.clamp(max=0) / tau)
    value = (1 - share) * softplus + powered
    slope = -(1 - share) * lower - powered + (1 - share) / tau * (powered - share * softplus)
    return value, slope, (1 + margin.abs()) * (1 + 1 / tau) ** 2
