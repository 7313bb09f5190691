"""The family of preference losses, from sequence log-probs: any number of weighted responses in one margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from wrpo_kernels.checks import check_backend_name
from wrpo_kernels.preference_loss import contract
from wrpo_kernels.preference_loss.arguments import loss_arguments
from wrpo_kernels.preference_loss.catalogue import Mixture, mixed_loss
from wrpo_kernels.preference_loss.family import LossArguments
from wrpo_kernels.preference_loss.reduction import reduce_loss


class PreferenceOutput(NamedTuple):
    """What every preference loss returns; only `loss` carries a gradient.

    From sequence log-probs, `logp` is the argument itself, detached: it shares its memory.
    """

    loss: Tensor  # [] float32, or [G] with reduction="none"
    logp: Tensor  # [S] float32, sequence log-probs, nats
    reward: Tensor  # [S] float32, implicit rewards r_s
    margin: Tensor  # [G] float32, margins m_g


def preference_loss(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    seq_weight: Tensor,
    group: Tensor,
    beta: float | Tensor,
    gamma: float | Tensor = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    length: Tensor | None = None,
    length_normalize: bool = False,
    nll_weight: float | Tensor = 0.0,
    group_weight: Tensor | None = None,
    num_groups: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    empty: str = "raise",
    backend: str | None = None,
) -> PreferenceOutput:
    """Preference loss of groups of weighted responses, from their sequence log-probs.

        r_s = beta_g * n_s * (logp[s] - ref_logp[s])            n_s = 1, or 1 / length[s] with length_normalize
        m_g = sum_{s in g} seq_weight[s] * r_s - gamma_g
        loss_g = group_weight[g] * phi(m_g) - sum_{s in g} nll_weight[s] * n_s * logp[s]

    With eps = label_smoothing, phi(m) =

        "sigmoid"   -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)               DPO, WRPO, SimPO
        "robust"    (-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)) / (1 - 2 eps)
        "hinge"     max(0, 1 - m)
        "ipo"       ((m - 1/2) / beta)^2                                          beta is the paper's tau
        "exo_pair"  q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)             q = sigmoid(m)
        "discopop"  (1 - t) (-log sigmoid(m)) + t exp(-m)                         t = sigmoid(m / discopop_tau)
        "kto"       1 - sigmoid(m)

    Further names are sums of such terms, of the two sides of a margin or of all groups of the call: "sigmoid_norm",
    "ipo_norm" (TRL's ipo), "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "orpo",
    "sft". Their formulas and sources, and which are as in TRL, are in docs/losses.md.

    WRPO is the weights [alpha, 1 - alpha, -1], DPO [1, -1]; several sources or several rejected responses are
    several weights.

    Args:
        logp: [S] float32, summed log-prob of each response under the policy, nats. The only input with a gradient.
        ref_logp: [S] float32, the same under the reference, summed too; None is reference-free. Default: None.
        seq_weight: [S] float32, weight of each response in its group's margin.
        group: [S] int64 in [0, G), the example that each response belongs to, in any order; every group has one at
            least. `group.unique(return_inverse=True)[1]` numbers ids that have gaps.
        beta: scale of the implicit reward, > 0: a number, or [G] float32, each example's own.
        gamma: target margin, in units of reward: a number, or [G] float32, each example's own, as in DPO with an
            offset. Default: 0.
        loss_type: one of the names above, or several, whose losses are added up. Default: "sigmoid".
        loss_weights: a number for each loss_type. Default: 1 each.
        f_divergence_type: what bends the log-ratios u = logp - ref_logp of losses of one margin: "reverse_kl" not at
            all; "forward_kl" to 1 - exp(-u); "js_divergence" to log 2 + log sigmoid(u); "alpha_divergence" to
            (exp((a - 1) u) - 1) / (a - 1). All but the first need ref_logp. The rewards returned are not bent.
            Default: "reverse_kl".
        f_alpha_divergence_coef: a. Default: 0.5.
        label_smoothing: probability that a preference is flipped, in [0, 0.5); for "sigmoid", "sigmoid_norm", "robust",
            "aot", "aot_unpaired", and "exo_pair", which needs one (its paper: 0.001). Default: 0.
        discopop_tau: temperature of the mixture in "discopop", > 0. Default: 0.05, the paper's.
        length: [S] int64, number of counted tokens; needed by length_normalize, by empty="zero", and by "orpo", "sft",
            "sigmoid_norm" and "ipo_norm". Default: none.
        length_normalize: divide each response's log-ratio by its own length. Default: False.
        nll_weight: number >= 0, or [S] float32 of either sign, weight of each response's negative log-likelihood.
            Default: 0.
        group_weight: [G] float32, factor of each example's loss, of every loss_type; 0 switches it off whatever the
            margin, in "aot" also its rank and in "sft" its tokens, and leaves its NLL to `nll_weight`. Default: 1.
        num_groups: G; None reads it from `group`, which waits for the device on an accelerator, and which
            torch.compile cannot do in one graph. Default: None.
        reduction: "mean" over groups, "sum", or "none" for [G]. Default: "mean".
        normalizer: number or 0-d tensor that replaces G under "mean", so that micro-batches of uneven size add up
            exactly: pass the number of examples of the whole batch. Default: G.
        empty: what a response of length 0 means: "raise" (ValueError), or "zero": its whole group counts nothing and
            leaves the mean. Default: "raise".
        backend: "native", "cuda", "triton" or "reference". Default: the first that can.

    Returns:
        PreferenceOutput(loss, logp [S], reward [S], margin [G]), float32; all but `loss` detached.

    Raises:
        ValueError: a shape, dtype, device or option is wrong; the message names it.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses.

        On an accelerator and in compiled code nobody looks at values first: an empty response under empty="raise", a
        negative length, a group that does not exist or has no sequence, and a `normalizer` that is not > 0 raise there
        only if an op meets them on the CPU. Else they make NaN of the loss of their group, or of all groups, and of its
        gradient; never a number.

    Compiled: `nll_weight`, `normalizer` and `num_groups` may change from call to call; beta and the other numbers are
        constants of the graph, so that each new value compiles again.
    Numerics: sums and exponentials in float64 in a fixed order, results rounded once to float32; where there are
        several terms, each of them, and under a divergence the bent log-ratios, whose exponents are bounded by 80.
    Memory: a few floats a sequence.
    Source: WRPO, arXiv:2412.03187; DPO 2305.18290; IPO 2310.12036; SimPO 2405.14734; hinge, SLiC-HF 2305.10425;
        robust 2403.00409; EXO 2402.00856; DiscoPOP 2406.08414; KTO 2402.01306; offset 2402.10571; f-divergences
        2309.16240; mixtures, MPO 2411.10442.
    """
    contract.check_logp(logp)
    check_backend_name(backend)
    loss, mixture, counted = loss_arguments(
        logp,
        logp.dtype,
        ref_logp=ref_logp,
        seq_weight=seq_weight,
        group=group,
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
        loss_weights=loss_weights,
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        label_smoothing=label_smoothing,
        discopop_tau=discopop_tau,
        length=length,
        length_normalize=length_normalize,
        nll_weight=nll_weight,
        group_weight=group_weight,
        num_groups=num_groups,
        empty=empty,
    )
    return loss_of_sequences(logp, loss, mixture, counted, reduction, normalizer, backend)


def loss_of_sequences(
    logp: Tensor,
    loss: LossArguments,
    mixture: Mixture | None,
    counted: int | Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
    backend: str | None,
) -> PreferenceOutput:
    if mixture is None:
        values, reward, margin, _ = contract.preference_loss(logp, *loss, backend)
    else:
        values, reward, margin = mixed_loss(logp, loss, mixture, backend)
    return PreferenceOutput(reduce_loss(values, reduction, normalizer, counted), logp.detach(), reward, margin)
