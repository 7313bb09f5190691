"""The registered op `wrpo::token_logp`: its check, schema, fake and autograd."""

from __future__ import annotations

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
from wrpo_kernels.dispatch.autograd import register_differentiable, register_kernel
from wrpo_kernels.dispatch.backends import choose
from wrpo_kernels.dispatch.triton_backend import TritonBackend
from wrpo_kernels.logit_transform import LogitTransform, check_transform
from wrpo_kernels.token_logp import cuda, native, reference

CANDIDATES = (native, cuda, TritonBackend("wrpo_kernels.token_logp.triton_kernel"), reference)

_OPTIONS = "Tensor? bias, float logit_scale, float softcap, float temperature, int ignore_index, str? backend"
torch.library.define("wrpo::token_logp", f"(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "wrpo::token_logp_backward",
    f"(Tensor grad_logp, Tensor logits, Tensor target, Tensor lse, {_OPTIONS}) -> Tensor",
)


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


def logp_dtype(scores: torch.dtype) -> torch.dtype:
    """Log-probabilities are float32; float64 only for float64 scores."""
    return torch.float64 if scores == torch.float64 else torch.float32


def _settle_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _token_logp(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    kernel = choose("token_logp", backend, CANDIDATES, logits)
    logp = logits.new_empty(logits.shape[0], dtype=logp_dtype(logits.dtype))
    lse = torch.empty_like(logp)
    transform = LogitTransform(bias, logit_scale, softcap, temperature)
    kernel.forward(_settle_rows(logits), target.contiguous(), ignore_index, transform, logp, lse)
    return logp, lse


def _token_logp_backward(
    grad_logp: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    ignore_index: int,
    backend: str | None,
) -> Tensor:
    kernel = choose("token_logp", backend, CANDIDATES, logits)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    transform = LogitTransform(bias, logit_scale, softcap, temperature)
    rows, grads = _settle_rows(logits), grad_logp.contiguous()
    kernel.grad(rows, target.contiguous(), ignore_index, transform, lse, grads, grad_logits)
    return grad_logits


@torch.library.register_fake("wrpo::token_logp")
def _fake(logits, target, bias, logit_scale, softcap, temperature, ignore_index, backend):
    check(logits, target, bias, logit_scale, softcap, temperature, ignore_index, backend)
    logp = logits.new_empty(logits.shape[0], dtype=logp_dtype(logits.dtype))
    return logp, torch.empty_like(logp)


@torch.library.register_fake("wrpo::token_logp_backward")
def _fake_backward(grad_logp, logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx, inputs, output):
    logits, target, bias, *options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, output[1], bias)
    ctx.options = options


def _backward(ctx, grad_logp, _):
    logits, target, lse, bias = ctx.saved_tensors
    grad_logits = token_logp_backward(grad_logp, logits, target, lse, bias, *ctx.options)
    grad_bias = grad_logits.sum(0, dtype=lse.dtype).to(bias.dtype) if ctx.needs_input_grad[-1] else None
    return grad_logits, None, grad_bias


token_logp_backward = register_kernel("token_logp_backward", _token_logp_backward)
token_logp = register_differentiable("token_logp", _token_logp, _save, _backward)
