"""A low-rank adapter (LoRA) on the head: the weight is neither copied nor given a gradient for its sake.

    logits = h W^T + low up^T         low = s dropout(h) A^T, up = B of arXiv:2106.09685
    dlow_t = c_t (delta_t up)         dup = sum_t delta_t^T (c_t low_t)         beside dh and dW, which stay as they are

Autograd leads dlow on to A and to h. With W frozen a step costs the two products of a frozen head and three of rank r.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from wrpo_kernels.checks import check_device, check_float, check_shape, check_tensor


class Adapter(NamedTuple):
    """Both None where the head has none."""

    low: Tensor | None = None  # [..., r]
    up: Tensor | None = None  # [V, r]


def checked_adapter(adapter: tuple[Tensor, Tensor] | None, hidden: Tensor, weight: Tensor) -> Adapter:
    if adapter is None:
        return Adapter()
    if not isinstance(adapter, (tuple, list)) or len(adapter) != 2:
        raise TypeError(f"adapter must be a pair (low [..., r], up [V, r]) or None, got {_shown(adapter)}")
    low, up = adapter
    for name, value in (("adapter's low", low), ("adapter's up", up)):
        check_tensor(name, value)
        check_float(name, value)
        check_device(name, value, "hidden", hidden.device)
    if up.dim() != 2 or up.shape[0] != weight.shape[0] or not up.shape[1]:
        raise ValueError(f"adapter's up must be [V={weight.shape[0]}, r] with r >= 1, got {list(up.shape)}")
    check_shape("adapter's low", low, "hidden's leading shape and r", *hidden.shape[:-1], up.shape[1])
    return Adapter(low, up)


def _shown(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind
