"""`token_logp` by the CUDA kernels of csrc/cuda/token_logp.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.checks import check_labels
from wrpo_kernels.dispatch import cuda_launch
from wrpo_kernels.logit_transform import LogitTransform

NAME = "cuda"
DTYPE_TAG = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST = 2**31 - 1  # rows, and elements of a row


def refuses(logits: Tensor) -> str | None:
    if logits.dtype not in DTYPE_TAG:
        return f"takes float32, bfloat16 or float16, got {logits.dtype}"
    if max(logits.shape) > MOST:
        return f"takes at most {MOST} rows of at most {MOST} scores, got {list(logits.shape)}"
    return cuda_launch.refuses(logits)


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """Writes `logp` [N] and `lse` [2, N]."""
    check_labels_if_asked(logits, target, ignore_index)
    launch_rows("token_logp", logits, target, ignore_index, transform, logp, lse)


def delta_(
    logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor, lse: Tensor
) -> None:
    """`forward`, and leaves `delta[n, v] = d logp[n] / d logits[n, v]` in place of the logits."""
    check_labels_if_asked(logits, target, ignore_index)
    launch_rows("token_logp_delta_", logits, target, ignore_index, transform, logp, lse)


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
    launch_rows("token_logp_grad", logits, target, ignore_index, transform, *rest)


def check_labels_if_asked(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if torch.is_anomaly_enabled():
        check_labels("target", target, ignore_index, logits.shape[1])


def launch_rows(
    kernel: str, logits: Tensor, target: Tensor, ignore_index: int, transform: LogitTransform, *rest: Tensor | int
) -> None:
    bias = None if transform.bias is None else transform.bias.to(torch.float32).contiguous()
    scalars = (transform.logit_scale, transform.softcap, 1.0 / transform.temperature)
    rows = (logits, DTYPE_TAG[logits.dtype], logits.shape[0], logits.shape[1], logits.stride(0))
    cuda_launch.launch(kernel, logits, *rows, target, ignore_index, bias, *scalars, *rest)
