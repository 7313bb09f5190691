"""`preference_loss` by one Triton launch, a program a group; sums of rows and coefficients of rows by one more each.

Everything is float64 as in the other backends; there are a few sequences to a group, so that its cost is the launch. A
wrong group cannot raise without waiting for the device: the margin of a group without sequences is NaN, and where any
sequence names a group outside [0, G), all margins and its own reward and coefficient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrpo_kernels.dispatch.triton_math import log1p, logistic, softplus
from wrpo_kernels.preference_loss.family import KERNELS, LossArguments

BLOCK = 256  # sequences at a time
HINGE, IPO, EXO_PAIR, DISCOPOP, KTO = (tl.constexpr(KERNELS.index(name)) for name in KERNELS[1:])


@triton.jit
def _weighted(weight, value):
    """Their product; a weight of 0 leaves no trace, even of a value that is not finite."""
    return tl.where(weight != 0.0, weight * value, 0.0)


@triton.jit
def _phi(m, beta, shape, LOSS: tl.constexpr):
    """The loss of a margin and its derivative, as in csrc/margin_loss.h."""
    if LOSS == HINGE:
        return tl.where(m >= 1.0, 0.0, 1.0 - m), tl.where(m < 1.0, -1.0, tl.where(m >= 1.0, 0.0, m))
    elif LOSS == IPO:
        distance = (m - 0.5) / beta
        return distance * distance, 2.0 * distance / beta
    elif LOSS == EXO_PAIR:
        q, rest, of_right, of_wrong = logistic(m), logistic(-m), log1p(-shape), tl.log(shape)
        value = _weighted(q, -softplus(-m) - of_right) + _weighted(rest, -softplus(m) - of_wrong)
        return value, _weighted(q * rest, m - of_right + of_wrong)
    elif LOSS == DISCOPOP:
        t, rest, log_loss = logistic(m / shape), logistic(-m / shape), softplus(-m)
        power = tl.where(m < 0.0, _weighted(1.0 / shape - 1.0, m), -m)  # t exp(-m) in one exponential
        exp_loss = tl.exp(power - log1p(tl.exp(tl.where(m < 0.0, m, -m) / shape)))
        slope = exp_loss * (rest / shape - 1.0) - rest * logistic(-m) - _weighted(t * rest / shape, log_loss)
        return _weighted(rest, log_loss) + exp_loss, slope
    elif LOSS == KTO:
        return logistic(-m), -logistic(m) * logistic(-m)
    else:  # shape 0 must not meet an infinite margin
        return softplus(-m) + _weighted(shape, m), shape - logistic(-m)


@triton.jit
def _is_stray(s, S, G, group):
    """Of sequences s: whether the group that they name does not exist."""
    member_of = tl.load(group + s, mask=s < S, other=0)
    return (s < S) & ((member_of < 0) | (member_of >= G))


@triton.jit
def _members(s, S, g, logp, ref_logp, seq_weight, group, length, beta, HAS_REF: tl.constexpr, BY_LENGTH: tl.constexpr):
    """Of sequences s: whether they are in group g, log-prob, n_s, reward and weight."""
    within = s < S
    mine = within & (tl.load(group + s, mask=within, other=-1) == g)
    lp = tl.load(logp + s, mask=mine, other=0.0).to(tl.float64)
    w = tl.load(seq_weight + s, mask=mine, other=0.0).to(tl.float64)
    ratio = lp
    if HAS_REF:
        ratio = lp - tl.load(ref_logp + s, mask=mine, other=0.0).to(tl.float64)
    n = tl.full(s.shape, 1.0, tl.float64)
    if BY_LENGTH:
        count = tl.load(length + s, mask=mine, other=0)
        n = tl.where(count > 0, n / tl.where(count > 0, count, 1).to(tl.float64), 0.0)
    return mine, lp, n, beta * _weighted(n, ratio), w


@triton.jit(do_not_specialize=["S", "G"])
def _preference_loss_fwd(
    logp,  # [S] float32
    ref_logp,  # [S] float32
    seq_weight,  # [S] float32
    group,  # [S] int64
    length,  # [S] int64
    nll_weight,  # [S] float32
    group_weight,  # [G] float32
    group_beta,  # [G] float32
    group_gamma,  # [G] float32
    loss,  # [G] float32
    reward,  # [S] float32
    margin,  # [G] float32
    coef,  # [S] float32
    S,
    G,
    beta_high,
    beta_low,
    gamma_high,
    gamma_low,
    shape_high,
    shape_low,
    LOSS: tl.constexpr,
    HAS_REF: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_GROUP_WEIGHT: tl.constexpr,
    HAS_GROUP_BETA: tl.constexpr,
    HAS_GROUP_GAMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Triton passes a Python float as float32: two of them hold 48 of a double's 53 bits.
    beta = tl.cast(beta_high, tl.float64) + tl.cast(beta_low, tl.float64)
    gamma = tl.cast(gamma_high, tl.float64) + tl.cast(gamma_low, tl.float64)
    shape = tl.cast(shape_high, tl.float64) + tl.cast(shape_low, tl.float64)
    g = tl.program_id(0)
    is_group = g < G
    if HAS_GROUP_BETA:
        beta = tl.load(group_beta + g, mask=is_group, other=1.0).to(tl.float64)
    if HAS_GROUP_GAMMA:
        gamma = tl.load(group_gamma + g, mask=is_group, other=0.0).to(tl.float64)
    one = tl.full([], 1.0, tl.float64)
    m, nll_sum, count = -gamma, one - one, one - one
    for first in range(0, S, BLOCK):
        s = first + tl.arange(0, BLOCK)
        mine, lp, n, r, w = _members(s, S, g, logp, ref_logp, seq_weight, group, length, beta, HAS_REF, BY_LENGTH)
        m += tl.sum(_weighted(w, r), 0) + tl.sum(tl.where(_is_stray(s, S, G, group), float("nan"), 0.0), 0)
        count += tl.sum(mine.to(tl.float64), 0)
        if HAS_NLL:
            nll = tl.load(nll_weight + s, mask=mine, other=0.0).to(tl.float64) * n
            nll_sum += tl.sum(_weighted(nll, lp), 0)
    m = tl.where(count > 0.0, m, float("nan"))
    value, slope = _phi(m, beta, shape, LOSS)
    if HAS_GROUP_WEIGHT:
        a = tl.load(group_weight + g, mask=is_group, other=0.0).to(tl.float64)
        value, slope = _weighted(a, value), _weighted(a, slope)
    tl.store(loss + g, (value - nll_sum).to(tl.float32), mask=is_group)
    tl.store(margin + g, m.to(tl.float32), mask=is_group)
    for first in range(0, S, BLOCK):
        s = first + tl.arange(0, BLOCK)
        mine, lp, n, r, w = _members(s, S, g, logp, ref_logp, seq_weight, group, length, beta, HAS_REF, BY_LENGTH)
        c = _weighted(w, beta * slope)
        if HAS_NLL:
            c -= tl.load(nll_weight + s, mask=mine, other=0.0).to(tl.float64)
        if g < G:
            tl.store(reward + s, r.to(tl.float32), mask=mine)
            tl.store(coef + s, _weighted(n, c).to(tl.float32), mask=mine)
        if g == 0:
            strays = _is_stray(s, S, G, group)
            tl.store(reward + s, float("nan"), mask=strays)
            tl.store(coef + s, float("nan"), mask=strays)


@triton.jit
def _rows_of(sequence, length, BLOCK: tl.constexpr):
    """First and last + 1 of a sequence's rows: the lengths before it are summed here, no launch of their own."""
    first = tl.full([], 0, tl.int64)
    for start in range(0, sequence, BLOCK):
        s = start + tl.arange(0, BLOCK)
        first += tl.sum(tl.load(length + s, mask=s < sequence, other=0), 0)
    return first, first + tl.load(length + sequence)


@triton.jit(do_not_specialize=["N"])
def _sequence_sum_fwd(rows, length, sums, N, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    first, last = _rows_of(sequence, length, BLOCK)
    last = tl.minimum(last, N)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        total += tl.load(rows + n, mask=n < last, other=0.0).to(tl.float64)
    tl.store(sums + sequence, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _over_rows_fwd(values, length, rows, N, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    first, last = _rows_of(sequence, length, BLOCK)
    last = tl.minimum(last, N)
    value = tl.load(values + sequence)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        tl.store(rows + n, tl.zeros([BLOCK], tl.float32) + value, mask=n < last)


def sequence_sum(rows: Tensor, length: Tensor) -> Tensor:
    """[N] -> [S]: rows stand sequence after sequence, `length` [S] of them each; float64 sums in a fixed order."""
    sums = rows.new_empty(len(length))
    _of_sequences(_sequence_sum_fwd, length, rows, length.contiguous(), sums, len(rows))
    return sums


def over_rows(values: Tensor, length: Tensor, num_rows: int) -> Tensor:
    """[S] -> [N]: every row gets the value of its sequence; NaN where the lengths name fewer rows than there are."""
    rows = values.new_full((num_rows,), torch.nan)
    _of_sequences(_over_rows_fwd, length, values, length.contiguous(), rows, num_rows)
    return rows


def _of_sequences(kernel: triton.JITFunction, length: Tensor, *arguments: Tensor | int) -> None:
    if len(length):
        with torch.cuda.device_of(length):
            kernel[(len(length),)](*arguments, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)


def forward(logp: Tensor, loss: LossArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns `loss` [G], `reward` [S], `margin` [G] and `coef` [S] = d loss[group[s]] / d logp[s]."""
    sequences, num_groups, family = loss
    value, margin = logp.new_empty(num_groups), logp.new_empty(num_groups)
    reward, coef = torch.empty_like(logp), torch.empty_like(logp)
    inputs = [logp if x is None else x.contiguous() for x in (logp, *sequences)]  # what is absent is not read
    with torch.cuda.device_of(logp):
        _preference_loss_fwd[(max(num_groups, 1),)](
            *inputs,
            *(value, reward, margin, coef),
            logp.shape[0],
            num_groups,
            *_halves(family.beta),
            *_halves(family.gamma),
            *_halves(family.shape),
            LOSS=family.kernel,
            HAS_REF=sequences.ref_logp is not None,
            BY_LENGTH=family.length_normalize,
            HAS_NLL=sequences.nll_weight is not None,
            HAS_GROUP_WEIGHT=sequences.group_weight is not None,
            HAS_GROUP_BETA=sequences.group_beta is not None,
            HAS_GROUP_GAMMA=sequences.group_gamma is not None,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return value, reward, margin, coef


def _halves(value: float) -> tuple[float, float]:
    """A number as the sum of two float32."""
    high = torch.tensor(value, dtype=torch.float32).item()
    return high, value - high
