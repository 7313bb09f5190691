"""Liger-Kernel's losses from hidden states, by the names, arguments and results of liger_kernel 0.8.

    from wrpo_kernels.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearCrossEntropyLoss

What cannot be had here raises NotImplementedError when the module is made. `compiled`, `chunk_size` and `accum_dtype`
are taken and not needed: nothing is compiled, memory is a budget in bytes, and sums are float32.
"""

from wrpo_kernels.integrations.liger.cross_entropy import LigerFusedLinearCrossEntropyLoss
from wrpo_kernels.integrations.liger.kto import LigerFusedLinearKTOLoss
from wrpo_kernels.integrations.liger.pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
