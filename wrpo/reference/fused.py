"""A reference that holds the source models' own log-probs: InfiFPO's, arXiv:2505.13878, eq. 10 to 13 and 23 to 24.

Every model M scores a response y with its own tokens, as the mean over them: s_i = log M_i(y|x) / |y|_i for each of the
sources, p the same of the policy before training. So no vocabulary is aligned. Then, for each response,

    clip    c_i = max(s_i, p) for a preferred response, min(s_i, p) for a rejected one
    fuse    f = sum_i g_i c_i,  sum_i g_i = 1

    max_margin    g is 1 for the source whose clipped score is farthest from p; after the clip that is the largest c_i
                  of a preferred response and the smallest of a rejected one
    average       g_i = 1 / M
    confidence    g_i proportional to 1 / (EPSILON - s_i)

and f takes the place of the reference in the length-normalised reward r = beta * (l / |y| - f), l the policy's summed
log-prob. In the loss's own form r = beta * (l - ref) / |y| that is ref = |y| * f, which is what is returned here. A
source that likes a preferred response less than the policy does, or a rejected one more, changes nothing.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from wrpo.data.batch import response_lengths
from wrpo.data.collation import Batch
from wrpo.data.roles import Role

from .reference import Reference

Fusion = Literal["max_margin", "average", "confidence"]
EPSILON = 1e-6  # nats; the paper names none


class FusedReference:
    """The reference log-probs of a batch, from those of the policy before training and the batch's `source_logp`.

    Args:
        own: gives the policy's own reference log-probs.
        fusion: "max_margin", "average" or "confidence".
    """

    def __init__(self, own: Reference, fusion: Fusion):
        self.own, self.fusion = own, fusion

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        """[S] float32, on the scale of sums over the policy's tokens.

        Raises:
            ValueError: the batch has no `source_logp`.
        """
        own = self.own(policy, batch)
        if "source_logp" not in batch or own is None:
            raise ValueError(
                f"reference_fusion={self.fusion!r} needs the batch's source_logp and a reference of the policy; give "
                "PreferenceCollator with_source_logp=True"
            )
        length = response_lengths(batch)
        return fused_logp(own, batch["source_logp"], length, batch["role"] == Role.REJECTED, self.fusion)


def fused_logp(own: Tensor, source_logp: Tensor, length: Tensor, is_rejected: Tensor, fusion: Fusion) -> Tensor:
    """The formula above.

    Args:
        own: [S] float32, summed log-prob of each response under the policy before training, nats.
        source_logp: [S, M] float32, mean log-prob a token of each response under each source, nats.
        length: [S] int64, the policy's tokens of each response; 0 gives 0.
        is_rejected: [S] bool.
        fusion: "max_margin", "average" or "confidence".

    Returns:
        [S] float32, length * f. Computed in float64.
    """
    own_mean = (own.double() / length.clamp(min=1))[:, None]  # [S, 1]
    source = source_logp.double()  # [S, M]
    clipped = torch.where(is_rejected[:, None], source.minimum(own_mean), source.maximum(own_mean))
    if fusion == "max_margin":
        fused = torch.where(is_rejected, clipped.amin(1), clipped.amax(1))
    elif fusion == "average":
        fused = clipped.mean(1)
    elif fusion == "confidence":
        share = 1.0 / (EPSILON - source)
        fused = (share * clipped).sum(1) / share.sum(1)
    else:
        raise ValueError(f"fusion must be one of {list(get_args(Fusion))}, got {fusion!r}")
    return (length * fused).float()
