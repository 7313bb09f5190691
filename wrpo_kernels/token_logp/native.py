"""`token_logp` by the compiled CPU kernels of csrc/cpu/token_logp.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.dispatch.backends import load_extension
from wrpo_kernels.logit_transform import LogitTransform

NAME = "native"
DTYPE_TAG = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(logits: Tensor) -> str | None:
    if not logits.is_cpu:
        return f"runs on cpu tensors, got {logits.device}"
    if logits.dtype not in DTYPE_TAG:
        return f"takes float32, bfloat16 or float16, got {logits.dtype}"
    module, reason = load_extension("_cpu")
    return None if module is not None else reason


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """Writes `logp` [N] and `lse` [2, N]."""
    run("token_logp", logits, target, ignore_index, transform, logp, lse)


def delta_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """`forward`, and leaves `delta[n, v] = d logp[n] / d logits[n, v]` in place of the logits."""
    run("token_logp_delta_", logits, target, ignore_index, transform, logp, lse)


def grad(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    logp: Tensor,
    lse: Tensor,
    grad_logp: Tensor,
    grad_logits: Tensor,
) -> None:
    """Writes `grad_logits[n, v] = grad_logp[n] * delta[n, v]`."""
    rest = (logp, lse, grad_logp, grad_logits, grad_logits.stride(0))
    run("token_logp_grad", logits, target, ignore_index, transform, *rest)


def run(
    kernel: str, logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, *rest: Tensor | int
) -> None:
    module, _ = load_extension("_cpu")
    bias = None if transform.bias is None else transform.bias.to(torch.float32).contiguous()
    getattr(module, kernel)(
        *rows_of(logits, target, ignore_index),
        0 if bias is None else bias.data_ptr(),
        *transform.scalars,
        *(value.data_ptr() if isinstance(value, Tensor) else value for value in rest),
        torch.get_num_threads(),
    )


def rows_of(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[int, ...]:
    """Rows [N, V] and their labels [N] as the kernels take them."""
    shape, stride = logits.shape, logits.stride(0)
    return logits.data_ptr(), DTYPE_TAG[logits.dtype], shape[0], shape[1], stride, target.data_ptr(), ignore_index
