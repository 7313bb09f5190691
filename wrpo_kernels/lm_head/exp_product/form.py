"""A head whose logits are never stored: the product h W^T leaves powers of two, from which log-probs and deltas follow.

    k_t    = log2(e) z_ty + 40                    the label's own score, known before the product
    P_tv   = 2^(log2(e) z_tv - k_t)               = p_tv / (p_ty 2^40), stored in bfloat16
    S_t    = sum_v P_tv = 2^-40 / p_ty            summed in float32, the label's term apart
    logp_t = -(40 + log2 S_t) ln 2
    delta_tv = onehot - p = -P_tv / S_t, and of the label's own entry (S_t - P_ty) / S_t, which takes its place in P

So no pass over the logits is left between the first product and the other two, which scale their rows by -c_t / S_t
instead of c_t. And the exponent of a logit is taken from its float32 sum: rounding to bfloat16 makes an error of its
own size in P, where it makes one of the logit's size in p. The powers fit bfloat16, whose exponents are those of
float32, while p_y > e^-83; rows beyond are done again with their log-sum-exp as k (`repair`), and hold p itself. On the
other side 1 - p_y is 0 where it is under 2^-86.

A softcap bends: P is then stored times dz/dx over its constant factor, and S summed without.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.dispatch.triton_backend import TritonBackend

OFFSET = 40.0  # bits below the label at which 1 is: P has 87 of them upwards until it overflows
LIMIT = -83.0  # nats; 119.7 bits: below this log-prob S is over 2^79.7
TABLE = Path(__file__).with_name("devices.json")


class ExpProduct(TritonBackend):
    """The backend, without importing Triton."""

    NAME = "triton_exp"

    def __init__(self) -> None:
        super().__init__("wrpo_kernels.lm_head.exp_product.launch")

    def refuses(self, tensor: Tensor) -> str | None:
        if tensor.dtype != torch.bfloat16:
            return f"takes bfloat16, in which powers of two from 2^-126 to 2^127 fit, got {tensor.dtype}"
        return super().refuses(tensor)

    def waits_to_be_named(self, tensor: Tensor) -> str | None:
        name = architecture(tensor.device)
        if tensor.device.type == "cpu" or row_of(name)["proved"] is None:
            return f"no test has run on {name} ({TABLE.name}); backend='triton_exp' asks for it"
        return None


@cache
def table() -> dict[str, dict[str, Any]]:
    """Of each architecture the shape of its tiles, and on which card and when the tests of the ops passed, or None."""
    return json.loads(TABLE.read_text())


def row_of(name: str) -> dict[str, Any]:
    return table().get(name, table()["any other"])


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., as the table names it."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"
