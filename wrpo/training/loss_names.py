"""The names of losses that a run may be told, and what each is to `wrpo_kernels.linear_preference_loss`."""

from __future__ import annotations

from typing import Literal, TypeAlias

LossName = Literal[
    "sigmoid", "hinge", "ipo", "simpo", "dpo", "robust", "exo_pair", "discopop", "kto", "sigmoid_norm", "ipo_norm",
    "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "sft", "cpo", "orpo",
]  # fmt: skip
Losses: TypeAlias = LossName | list[LossName]
DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

WITHOUT_MARGIN = ("bco_pair", "nca_pair", "sppo_hard", "apo_zero", "orpo", "sft")
# Names of whole recipes, each alone: their losses.
RECIPES = {"simpo": ("sigmoid",), "dpo": ("sigmoid",), "cpo": ("sigmoid", "sft"), "orpo": ("orpo", "sft")}
REFERENCE_FREE = ("simpo", "cpo", "orpo")
SMOOTHED = ("sigmoid", "simpo", "dpo", "cpo", "robust", "exo_pair", "sigmoid_norm", "aot", "aot_unpaired")
OF_DIVERGENCES = (
    "sigmoid",
    "dpo",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "discopop",
    "kto",
    "sigmoid_norm",
    "ipo_norm",
    "sft",
)


def only_name(loss_type: Losses) -> Losses:
    """A list of one as its name."""
    return loss_type[0] if isinstance(loss_type, list) and len(loss_type) == 1 else loss_type


def names_in(loss_type: Losses) -> list[LossName]:
    return loss_type if isinstance(loss_type, list) else [loss_type]


def losses_of(loss_type: Losses) -> list[str]:
    """`loss_type` as the kernels have it."""
    return [loss for name in names_in(loss_type) for loss in RECIPES.get(name, (name,))]


def check_losses(
    loss_type: Losses, weights: list[float] | None, gamma: float, smoothing: float, divergence: str, reference: str
) -> None:
    """Raises ValueError for losses that cannot be had together, or not with these settings."""
    names = names_in(loss_type)
    recipes = [name for name in names if name in RECIPES]
    unsmoothed = smoothing and not any(name in SMOOTHED for name in names)
    unbent = [name for name in names if name not in OF_DIVERGENCES]
    number = len(losses_of(loss_type))
    contradictions = {
        "loss_type must name a loss, got an empty list": not names,
        f"loss_type {recipes[:1]} is a whole recipe and stands alone, got {names}": len(names) > 1 and bool(recipes),
        f"loss_weights must be {number} numbers, one for each of {losses_of(loss_type)}, got {weights}": (
            weights is not None and len(weights) != number
        ),
        f"gamma belongs to a margin, which loss_type {loss_type!r} has none of; set it to 0": (
            gamma != 0 and all(name in WITHOUT_MARGIN for name in names)
        ),
        f"loss_label_smoothing belongs to {', '.join(SMOOTHED)}, got loss_type {loss_type!r}": unsmoothed,
        "loss_label_smoothing must be > 0 for loss_type 'exo_pair'; its paper takes 0.001": (
            "exo_pair" in names and not smoothing
        ),
        f"f_divergence_type {divergence!r} belongs to losses of one margin, got loss_type {unbent[:1]}": (
            divergence != "reverse_kl" and bool(unbent)
        ),
        f"f_divergence_type {divergence!r} bends the log-ratio to a reference, got reference 'none'": (
            divergence != "reverse_kl" and reference == "none"
        ),
        f"reference must be none (or auto) for loss_type {loss_type!r}, got {reference!r}": (
            loss_type in REFERENCE_FREE and reference not in ("auto", "none")
        ),
    }
    for words, holds in contradictions.items():
        if holds:
            raise ValueError(words)
