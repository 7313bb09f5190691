"""The registered op `wrpo::token_logp`: its check, schema, fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    check_backend_name,
    check_device,
    check_float,
    check_int,
    check_int64,
    check_shape,
    check_tensor,
)
from wrpo_kernels.dispatch.autograd import register, register_differentiable
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.dispatch.huge_pages import in_huge_pages
from wrpo_kernels.dispatch.schema import Arguments
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.logit_transform import LogitTransform, check_transform
from wrpo_kernels.token_logp import cuda, native, reference

CANDIDATES = (native, cuda, TritonBackend("wrpo_kernels.token_logp.triton_kernel"), reference)


def check(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str | None,
) -> None:
    check_tensor("logits", logits)
    check_tensor("target", target)
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V >= 1, got {list(logits.shape)}")
    check_int64("target", target)
    check_shape("target", target, "logits' leading shape", *logits.shape[:-1])
    check_device("target", target, "logits", logits.device)
    check_transform(bias, logit_scale, softcap, temperature, logits, logits.shape[-1])
    check_int("ignore_index", ignore_index)
    check_backend_name(backend)


def _check(logits: Tensor, target: Tensor, transform: LogitTransform, ignore_index: int, backend: str | None) -> None:
    check(logits, target, *transform, ignore_index, backend)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, V], got {list(logits.shape)}")


def _check_backward(
    grad_logp: Tensor, logits: Tensor, target: Tensor, logp: Tensor, lse: Tensor, *options: Any
) -> None:
    _check(logits, target, *options)
    number = logits.shape[0]
    check_like_logp("grad_logp", grad_logp, logits, (number,))
    check_like_logp("logp", logp, logits, (number,))
    check_like_logp("lse", lse, logits, (2, number))


def check_like_logp(name: str, value: Tensor, scores: Tensor, shape: tuple[int, ...]) -> None:
    """Something that has been computed beside log-probs of these scores."""
    check_shape(name, value, "as the op returned it", *shape)
    check_device(name, value, "the scores", scores.device)
    if value.dtype != logp_dtype(scores.dtype):
        raise ValueError(f"{name} must be {logp_dtype(scores.dtype)}, got {value.dtype}")


def logp_dtype(scores: torch.dtype) -> torch.dtype:
    """Log-probabilities are float32; float64 only for float64 scores."""
    return torch.float64 if scores == torch.float64 else torch.float32


def _contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _token_logp(
    logits: Tensor, target: Tensor, transform: LogitTransform, ignore_index: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    kernel = choose(backend, CANDIDATES, logits)
    logp = logits.new_empty(logits.shape[0], dtype=logp_dtype(logits.dtype))
    lse = logp.new_empty(2, len(logp))
    kernel.forward(_contiguous_rows(logits), target.contiguous(), ignore_index, transform, logp, lse)
    return logp, lse


def _fake(
    logits: Tensor, target: Tensor, transform: LogitTransform, ignore_index: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    logp = logits.new_empty(logits.shape[0], dtype=logp_dtype(logits.dtype))
    return logp, logp.new_empty(2, logits.shape[0])


def _token_logp_backward(
    grad_logp: Tensor,
    logits: Tensor,
    target: Tensor,
    logp: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    backend: str | None,
) -> Tensor:
    kernel = choose(backend, CANDIDATES, logits)
    grad_logits = in_huge_pages(torch.empty(logits.shape, dtype=logits.dtype, device=logits.device))
    rows, grads = _contiguous_rows(logits), grad_logp.contiguous()
    kernel.grad(rows, target.contiguous(), ignore_index, transform, logp, lse, grads, grad_logits)
    return grad_logits


def _fake_backward(grad_logp: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(
    ctx: Any,
    outputs: tuple[Tensor, Tensor],
    logits: Tensor,
    target: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    backend: str | None,
) -> None:
    logp, lse = outputs
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, target, logp, lse, transform.bias)
    ctx.transform, ctx.options = transform._replace(bias=None), (ignore_index, backend)


def _backward(ctx: Any, grad_logp: Tensor, _: None) -> dict[str, Tensor | None]:
    logits, target, logp, lse, bias = ctx.saved_tensors
    transform = ctx.transform._replace(bias=bias)
    grad_logits = token_logp_backward(grad_logp, logits, target, logp, lse, transform, *ctx.options)
    has_grad = bias is not None and bias.requires_grad
    return {"logits": grad_logits, "bias": grad_logits.sum(0, dtype=lse.dtype).to(bias.dtype) if has_grad else None}


_OPTIONS = (LogitTransform, "SymInt ignore_index", "str? backend")
token_logp = register_differentiable(
    "token_logp",
    Arguments("Tensor logits", "Tensor target", *_OPTIONS),
    "Tensor logp, Tensor lse",
    check=_check,
    kernel=_token_logp,
    fake=_fake,
    save=_save,
    backward=_backward,
)
token_logp_backward = register(
    "token_logp_backward",
    Arguments("Tensor grad_logp", "Tensor logits", "Tensor target", "Tensor logp", "Tensor lse", *_OPTIONS),
    "Tensor",
    check=_check_backward,
    kernel=_token_logp_backward,
    fake=_fake_backward,
)
