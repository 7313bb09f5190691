"""Log-probability of each target token, from logits that exist."""

from __future__ import annotations

from torch import Tensor

from wrpo_kernels.checks import int64_labels
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp import contract


def token_logp(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each target token, without storing the softmax.

        z = softcap * tanh(logit_scale * (logits + bias) / softcap) / temperature      (no softcap: no tanh)
        logp[n] = z[n, target[n]] - logsumexp_v z[n, v]

    Args:
        logits: [..., V] float32 | bfloat16 | float16, unnormalised scores in nats. Any row stride; rows that are not
            contiguous, or whose leading dimensions cannot be flattened, are copied.
        target: [...] int64 | int32 in [0, V), or `ignore_index`.
        bias: [V] added to the logits. Default: none.
        logit_scale: factor on logits and bias. Default: 1.
        softcap: bound of the tanh, in nats. Default: none.
        temperature: divides the scores, > 0. Default: 1.
        ignore_index: such rows give logp 0 and gradient 0, whatever stands in them. Default: -100.
        backend: "native", "cuda", "triton" or "reference". Default: the first that can; `python -m wrpo_kernels` says
            which.

    Returns:
        [...] float32, nats, <= 0. Differentiable in `logits` and `bias`. (float64 for float64 logits.)

    Raises:
        ValueError: a shape, dtype, device, option or target out of range; the message names it. On an accelerator a
            target out of range makes NaN of its own row instead, for reading it would wait.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses; the message holds its reason.

    Numerics: reads in the input type, computes and accumulates in float32, the gradient is rounded once to the type
        of the logits (bfloat16 beyond 2^111 may be NaN); the same bits on every run and for every number of threads.
    Memory: keeps three floats a row for the backward; the gradient is the only [N, V] tensor that is made.
    Source: WRPO, arXiv:2412.03187; online softmax, arXiv:1805.02867.
    """
    target = int64_labels("target", target)
    contract.check(logits, target, bias, logit_scale, softcap, temperature, ignore_index, backend)
    rows = logits.reshape(-1, logits.shape[-1])
    transform = LogitTransform(bias, float(logit_scale), float(softcap or 0.0), float(temperature))
    logp, _ = contract.token_logp(rows, target.reshape(-1), transform, ignore_index, backend)
    return logp.view(target.shape)
