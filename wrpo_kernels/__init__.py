"""Preference losses at the speed of the bare matrix products: the `[tokens, vocabulary]` tensors never exist.

`python -m wrpo_kernels` says which implementation runs here, and why the others do not.
"""

from wrpo_kernels.cross_entropy import linear_cross_entropy
from wrpo_kernels.kto import kto_loss, linear_kto_loss
from wrpo_kernels.likelihood import LikelihoodOutput, linear_nll_loss
from wrpo_kernels.linear_preference_loss import linear_preference_loss
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.linear_token_statistics import TokenStatistics, linear_token_statistics
from wrpo_kernels.pairwise import (
    dpo_loss,
    ipo_loss,
    linear_dpo_loss,
    linear_ipo_loss,
    linear_simpo_loss,
    simpo_loss,
)
from wrpo_kernels.preference_loss import PreferenceOutput, preference_loss
from wrpo_kernels.token_logp import token_logp
from wrpo_kernels.version import __version__
from wrpo_kernels.weighted_reward import linear_wrpo_loss, wrpo_loss

__all__ = [
    "LikelihoodOutput",
    "PreferenceOutput",
    "TokenStatistics",
    "__version__",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_ipo_loss",
    "linear_kto_loss",
    "linear_nll_loss",
    "linear_preference_loss",
    "linear_simpo_loss",
    "linear_token_logp",
    "linear_token_statistics",
    "linear_wrpo_loss",
    "preference_loss",
    "simpo_loss",
    "token_logp",
    "wrpo_loss",
]
