"""Every public function as one of tensors alone, with tensors to call it on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from cost import budget_of
from torch import Tensor

from wrpo_kernels import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    linear_cross_entropy,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_kto_loss,
    linear_nll_loss,
    linear_preference_loss,
    linear_simpo_loss,
    linear_token_logp,
    linear_token_statistics,
    linear_wrpo_loss,
    preference_loss,
    simpo_loss,
    token_logp,
    wrpo_loss,
)

S, T, D, V, G = 6, 5, 8, 23, 2  # and S / 2 pairs
SMALL_BUDGET = budget_of(4, V, D, torch.float32)
LARGE = 1024  # a V for which the head is not a small one, with D = 260


def tensors(
    device: torch.device, dtype: torch.dtype = torch.float32, steps: int = T, vocabulary: int = V, width: int = D
):
    """hidden, weight, bias, labels, ref_logp; all that require grad do."""
    labels = torch.randint(0, vocabulary, (S, steps))
    labels[:, 0], labels[2, -1] = -100, -100
    floats = (torch.randn(S, steps, width), torch.randn(vocabulary, width), torch.randn(vocabulary))
    hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in floats)
    return hidden, weight, bias, labels.to(device), -3.0 * steps + torch.randn(S, device=device)


def general(device: torch.device) -> dict:
    weight = torch.tensor([0.3, 1.0, 0.7, -1.0, -0.5, -0.5], device=device)
    return {
        "seq_weight": weight,
        "group": torch.tensor([0, 1, 0, 0, 1, 1], device=device),
        "num_groups": G,
        "beta": 0.1,
    }


def doors(device: torch.device, backend: str, **size) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every public function as one of tensors alone, with tensors to call it on."""
    hidden, weight, bias, labels, ref = tensors(device, **size)
    logits = (hidden @ weight.T).detach().requires_grad_()
    logp = (ref + torch.randn(S, device=device)).requires_grad_()
    head = {"softcap": 20.0, "logit_scale": 0.7, "backend": backend}
    options = general(device)
    adapter = (torch.randn(S, labels.shape[1], 2, device=device), torch.randn(weight.shape[0], 2, device=device))
    low, up = (x.to(hidden.dtype).requires_grad_() for x in adapter)
    packed = (hidden.detach().flatten(0, 1).requires_grad_(), weight, bias, labels.flatten(), ref)
    bounds = torch.arange(0, (S + 1) * labels.shape[1], labels.shape[1], device=device)

    lengths = (labels != -100).sum(1)
    is_good = torch.arange(S, device=device) % 2 == 0

    def linear(door, h, w, b, y, r, **rest):
        return door(h, w, y, r, bias=b, **head, **rest).loss

    def statistics(h, w, b, y, **rest):
        found = linear_token_statistics(h, w, y, bias=b, **head, **rest)
        return torch.stack([value for name, value in found._asdict().items() if name not in ("top1", "logp_of_ids")])

    def paired(door, x, r):
        return door(*x.chunk(2), *r.chunk(2), backend=backend).loss

    general_door = partial(linear_preference_loss, **options)
    wrpo_door = partial(linear_wrpo_loss, alpha=0.3)
    given = (hidden, weight, bias, labels, ref)
    return {
        "token_logp": (lambda z, b, y: token_logp(z, y, bias=b, **head), (logits, bias, labels)),
        "linear_token_logp": (lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, **head), given[:4]),
        "linear_token_logp, small budget": (
            lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, budget_bytes=SMALL_BUDGET, **head),
            given[:4],
        ),
        "linear_token_logp, frozen head": (
            lambda h, w, b, y: linear_token_logp(h, w, y, bias=b, **head),
            (hidden, weight.detach(), bias.detach(), labels),
        ),
        "linear_token_statistics": (statistics, given[:4]),
        "linear_token_statistics, small budget": (
            lambda h, w, b, y: statistics(h, w, b, y, budget_bytes=SMALL_BUDGET),
            given[:4],
        ),
        "preference_loss": (
            lambda x, r: preference_loss(x, r, nll_weight=0.1, backend=backend, **options).loss,
            (logp, ref),
        ),
        "wrpo_loss": (lambda x, r: wrpo_loss(x, r, alpha=0.3, backend=backend).loss, (logp, ref)),
        "linear_preference_loss": (partial(linear, general_door), given),
        "linear_preference_loss, small budget": (partial(linear, general_door, budget_bytes=SMALL_BUDGET), given),
        "linear_preference_loss, each group": (partial(linear, general_door, reduction="none"), given),
        "linear_preference_loss, packed": (partial(linear, general_door, cu_seqlens=bounds), packed),
        "linear_wrpo_loss": (partial(linear, wrpo_door), given),
        "linear_nll_loss": (lambda h, w, b, y: linear_nll_loss(h, w, y, bias=b, **head).loss, given[:4]),
        "linear_nll_loss, small budget": (
            lambda h, w, b, y: linear_nll_loss(h, w, y, bias=b, budget_bytes=SMALL_BUDGET, **head).loss,
            given[:4],
        ),
        "dpo_loss": (partial(paired, dpo_loss), (logp, ref)),
        "ipo_loss": (partial(paired, ipo_loss), (logp, ref)),
        "simpo_loss": (partial(paired, simpo_loss), (logp, lengths)),
        "kto_loss": (
            lambda x, r: kto_loss(x, r, is_desirable=is_good, kl=0.5, backend=backend).loss,
            (logp, ref),
        ),
        "linear_kto_loss": (
            lambda h, w, b, y, r: linear_kto_loss(h, w, y, r, bias=b, is_desirable=is_good, **head).loss,
            given,
        ),
        "linear_dpo_loss": (partial(linear, linear_dpo_loss), given),
        "linear_ipo_loss": (partial(linear, linear_ipo_loss), given),
        "linear_simpo_loss": (
            lambda h, w, b, y: linear_simpo_loss(h, w, y, bias=b, **head).loss,
            given[:4],
        ),
        "linear_cross_entropy": (
            lambda h, w, b, y: linear_cross_entropy(h, w, y, bias=b, shift=True, **head),
            given[:4],
        ),
        "linear_token_logp, adapter": (
            lambda h, w, low, up, y: linear_token_logp(h, w, y, adapter=(low, up), **head),
            (hidden, weight.detach(), low, up, labels),
        ),
        "linear_preference_loss, adapter, small budget": (
            lambda h, w, low, up, b, y, r: linear(
                general_door, h, w, b, y, r, adapter=(low, up), budget_bytes=SMALL_BUDGET
            ),
            (hidden, weight.detach(), low, up, bias.detach(), labels, ref),
        ),
    }


def value_and_gradients(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x for x in given if x.requires_grad]
    value = function(*given)
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value.detach(), *(grad for grad in grads if grad is not None)]


DOORS = tuple(doors(torch.device("cpu"), "reference"))
# Without the losses that call the general ones: for what is true of an op, whoever calls it.
OF_OPS = tuple(
    door for door in DOORS if not door.endswith(("dpo_loss", "ipo_loss", "simpo_loss", "kto_loss", "cross_entropy"))
)
