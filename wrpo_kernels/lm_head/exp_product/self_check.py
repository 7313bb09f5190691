"""The first call in a process computes a small problem too, and looks whether the kernels are right on this device.

A card, driver or release of Triton that no test has met could multiply wrongly and look right. 136 rows, two blocks of
them, take milliseconds beside the compilation, which the call needs anyway.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from wrpo_kernels.lm_head.exp_product.form import ExpProduct
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import reference

N, V, D, R = 136, 272, 96, 16  # multiples of 16, as those of most heads: the call then needs no compilation of its own
IGNORE = -100
# Largest errors: of a log-prob, in nats (1e-5 of float32 sums of scores up to 300 was measured), and of an entry of
# the delta beside its size (a power in bfloat16 is rounded by 2^-9).
LOGP_ERROR, DELTA_ERROR = 2e-3, 2.0**-7


def require(kernel: ExpProduct, device: torch.device, transform: LogitTransform, has_adapter: bool) -> None:
    """Raises where the kernels are not to be trusted with such a call on this device."""
    wrong = mismatch(kernel, device, transform.bias is not None, transform.softcap > 0, has_adapter)
    if wrong is not None:
        raise RuntimeError(f"triton_exp: {wrong}; pass another backend")


@cache
def mismatch(
    kernel: ExpProduct, device: torch.device, has_bias: bool, has_softcap: bool, has_adapter: bool
) -> str | None:
    """What is wrong with the deltas on this device, or None. Waits for the device, once for each transform."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "has to compare itself with plain torch once, which a CUDA graph cannot capture: call it before"
    operands, target, transform = _problem(device, has_bias, has_softcap, has_adapter)
    logp, out = torch.empty(N, device=device), torch.empty(N, V, dtype=torch.bfloat16, device=device)
    kernel.delta_of_hidden(operands, target, IGNORE, transform, logp, out)
    scale = kernel.coefficients(torch.ones_like(logp)[:, None], logp, transform.slope)
    return compared(logp, out * scale, operands, target, transform)


def compared(logp: Tensor, delta: Tensor, operands: tuple, target: Tensor, transform: LogitTransform) -> str | None:
    """Beside the whole logits in float64."""
    hidden, weight, low, up = [None if x is None else x.double() for x in operands]
    true_delta = hidden @ weight.T if low is None else hidden @ weight.T + low @ up.T
    true_logp = true_delta.new_empty(len(target))
    reference.delta_(true_delta, target, IGNORE, transform, true_logp, true_logp.new_empty(2, len(target)))
    wrong = (logp - true_logp).abs() > LOGP_ERROR
    allowed = DELTA_ERROR * true_delta.abs() + 1e-6 * true_delta.abs().amax(1, keepdim=True)
    wrong |= ~((delta - true_delta).abs() <= allowed).all(1)
    if not wrong.any():
        return None
    return f"{int(wrong.sum())} of {len(target)} rows of a small problem are wrong on {logp.device}"


def _problem(
    device: torch.device, has_bias: bool, has_softcap: bool, has_adapter: bool
) -> tuple[tuple[Tensor | None, ...], Tensor, LogitTransform]:
    """Rows of even scores, of peaked ones, and of some whose label is so unlikely that they are repaired."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw)
    hidden[N // 2 :] *= 4
    hidden[-8:] *= 15
    shapes = ((V, D), (N, R), (V, R))
    weight, low, up = (torch.randn(*shape, generator=draw) * shape[1] ** -0.5 for shape in shapes)
    target = torch.randint(0, V, (N,), generator=draw)
    target[::17] = IGNORE
    operands = [x.to(device, torch.bfloat16) for x in (hidden, weight, low, up)]
    bias = torch.randn(V, generator=draw).to(device) if has_bias else None
    transform = LogitTransform(bias, 1.0, 30.0 * has_softcap, 1.0)
    return (*operands[:2], *(operands[2:] if has_adapter else (None, None))), target.to(device), transform
