"""The reward of DPO under another divergence than the reverse KL, as a function of the log-ratio.

Where the policy stays near its reference by the divergence f, its reward is beta f'(pi / pi_ref). Of u = log pi/pi_ref:

    reverse_kl        u                                         DPO
    forward_kl        1 - exp(-u)
    js_divergence     log 2 + log sigmoid(u)
    alpha_divergence  (exp((a - 1) u) - 1) / (a - 1)            a = f_alpha_divergence_coef; of a = 1 it is u

Source: arXiv:2309.16240; names and coefficient as in TRL.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wrpo_kernels.checks import check_number

KINDS = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # e^80 = 6e34: a float32


class Divergence(NamedTuple):
    kind: str
    alpha: float

    @property
    def bends(self) -> bool:
        return self.kind != "reverse_kl" and not (self.kind == "alpha_divergence" and self.alpha == 1)

    def check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"f_divergence_type must be one of {list(KINDS)}, got {self.kind!r}")
        check_number("f_alpha_divergence_coef", self.alpha)


def score(ratio: Tensor, divergence: Divergence) -> Tensor:
    """f'(exp ratio), in the type of the log-ratios; computed in float64."""
    wide = ratio.double()
    if divergence.kind == "js_divergence":
        return (math.log(2) + F.logsigmoid(wide)).to(ratio.dtype)
    slope = -1.0 if divergence.kind == "forward_kl" else divergence.alpha - 1.0
    return (torch.expm1((slope * wide).clamp(max=LARGEST_EXPONENT)) / slope).to(ratio.dtype)
