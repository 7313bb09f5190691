"""What other libraries' functions do under autocast, and the ops of this library leave to their caller."""

from __future__ import annotations

import torch
from torch import Tensor


def as_linear_takes_it(hidden: Tensor) -> Tensor:
    """Hidden states in the type in which `F.linear` would multiply them; it leaves float64 as it is."""
    kind = hidden.device.type
    is_cast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    return hidden.to(torch.get_autocast_dtype(kind)) if is_cast else hidden
