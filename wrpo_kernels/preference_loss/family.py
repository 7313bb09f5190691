"""The options that single out one loss of the preference family; none of them is a tensor."""

from __future__ import annotations

from typing import NamedTuple

from wrpo_kernels.checks import check_number

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


class Family(NamedTuple):
    beta: float
    gamma: float
    loss_type: str
    label_smoothing: float
    length_normalize: bool


def check_family(beta: float, gamma: float, loss_type: str, label_smoothing: float) -> None:
    check_number("beta", beta, above=0.0)
    check_number("gamma", gamma)
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {list(LOSS_TYPES)}, got {loss_type!r}")
    check_number("label_smoothing", label_smoothing, least=0.0)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing belongs to loss_type 'sigmoid', got {label_smoothing} with {loss_type!r}")
