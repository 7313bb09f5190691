"""The losses of (chosen, rejected) pairs under their own names: `preference_loss` with the weights [1, -1].

From log-probs they take chosen and rejected apart, each [B]. From hidden states they take one batch of 2B sequences: B
chosen, then B rejected in the same order, as TRL and Liger do.
"""

from wrpo_kernels.pairwise.dpo import dpo_loss, linear_dpo_loss
from wrpo_kernels.pairwise.ipo import ipo_loss, linear_ipo_loss
from wrpo_kernels.pairwise.simpo import linear_simpo_loss, simpo_loss

__all__ = ["dpo_loss", "ipo_loss", "linear_dpo_loss", "linear_ipo_loss", "linear_simpo_loss", "simpo_loss"]
