"""Pairs of responses as `preference_loss` takes them: 2B sequences, B chosen, then B rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import (
    LARGEST_FLOAT32,
    as_float,
    check_bool,
    check_constant,
    check_device,
    check_int64,
    check_number,
    check_shape,
    check_tensor,
)
from wrpo_kernels.dispatch.transfer import to_device
from wrpo_kernels.layout import HOST, count_sequences, role_by_role


def pair_arguments(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    *,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    chosen_length: Tensor | None,
    rejected_length: Tensor | None,
    length_normalize: bool,
    nll_weight: float | Tensor,
) -> dict[str, Any]:
    """`preference_loss`'s arguments of pairs, whose tensors are each [B]."""
    check_tensor("chosen_logp", chosen_logp)
    check_tensor("rejected_logp", rejected_logp)
    if chosen_logp.dim() != 1:
        raise ValueError(f"chosen_logp must be [B], got {list(chosen_logp.shape)}")
    check_bool("length_normalize", length_normalize)
    if length_normalize and chosen_length is None and rejected_length is None:
        raise ValueError("length_normalize=True needs chosen_length and rejected_length, numbers of counted tokens [B]")
    return {
        "logp": _joined("{}_logp", chosen_logp, rejected_logp, chosen_logp, _check_logp),
        "ref_logp": _joined("ref_{}_logp", ref_chosen_logp, ref_rejected_logp, chosen_logp, _check_reference),
        "length": _joined("{}_length", chosen_length, rejected_length, chosen_logp, check_int64),
        "length_normalize": length_normalize,
        **_weights(len(chosen_logp), nll_weight, chosen_logp.device, chosen_logp.device),
    }


def linear_pair_arguments(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, nll_weight: float | Tensor
) -> dict[str, Any]:
    """The weights of 2B sequences, as arguments of `linear_preference_loss`."""
    check_tensor("hidden", hidden)
    num_sequences = count_sequences(labels, cu_seqlens)
    if num_sequences % 2:
        holder = "labels" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{holder} must hold 2 * B sequences, B chosen, then B rejected, got {num_sequences}")
    return _weights(num_sequences // 2, nll_weight, hidden.device, HOST)


def _weights(pairs: int, nll_weight: float | Tensor, device: torch.device, group_on: torch.device) -> dict[str, Any]:
    signs = to_device([1.0, -1.0], torch.float64, device)
    return {**role_by_role(signs, pairs, group_on), "nll_weight": _of_chosen(nll_weight, pairs, device)}


def _of_chosen(nll_weight: float | Tensor, pairs: int, device: torch.device) -> float | Tensor:
    """[2B], 0 for the rejected responses; the number 0 where no response has a weight."""
    if not isinstance(nll_weight, Tensor):
        check_number("nll_weight", nll_weight, least=0.0, most=LARGEST_FLOAT32)
        if not nll_weight:
            return 0.0
        # A product, since a number that fills a tensor would be a constant to torch.compile.
        nll_weight = torch.ones(pairs, dtype=torch.float64, device=device) * as_float(nll_weight)
    check_shape("nll_weight", nll_weight, "[B]", pairs)
    return torch.cat([nll_weight, torch.zeros_like(nll_weight)])


def _joined(
    name: str, chosen: Tensor | None, rejected: Tensor | None, like: Tensor, check: Callable[[str, Tensor], None]
) -> Tensor | None:
    """[2B] of two tensors, each [B] as `like`; None where neither is given. `name` has a brace for the side."""
    names = name.format("chosen"), name.format("rejected")
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        raise ValueError(f"{names[0]} and {names[1]} belong together: pass both, or neither")
    for argument, value in zip(names, (chosen, rejected), strict=True):
        check_tensor(argument, value)
        check_shape(argument, value, "[B] as chosen_logp", *like.shape)
        check_device(argument, value, "chosen_logp", like.device)
        check(argument, value)
    return torch.cat([chosen, rejected])


def _check_logp(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 sequence log-probs, got {value.dtype}")


def _check_reference(name: str, value: Tensor) -> None:
    _check_logp(name, value)
    check_constant(name, value)
