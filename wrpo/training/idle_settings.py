"""Settings of preference optimisation that nothing reads unless another one asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from wrpo.settings import refuse_idle

from .loss_names import REFERENCE_FREE, losses_of

if TYPE_CHECKING:
    from .wrpo_config import WRPOConfig


class Reader(NamedTuple):
    """What reads some settings, and whether the run has it."""

    is_asked: bool
    by: str
    names: tuple[str, ...]


def refuse_idle_settings(config: WRPOConfig) -> None:
    """Raises SettingsError for the first that was set though nothing reads it."""
    for reader in _readers(config):
        refuse_idle(config, reader.is_asked, reader.by, *reader.names)


def _readers(config: WRPOConfig) -> Iterator[Reader]:
    adapts, rises = config.alpha_schedule == "adaptive", config.alpha_schedule != "constant"
    weighs_sources = config.loss_type != "dpo"
    is_free = config.loss_type in REFERENCE_FREE
    precomputes = config.reference in ("auto", "precompute") and not is_free and not config.sync_ref_model
    bends = config.f_divergence_type == "alpha_divergence"

    yield Reader(config.sync_ref_model, "sync_ref_model", ("ref_model_mixup_alpha", "ref_model_sync_steps"))
    yield Reader("discopop" in losses_of(config.loss_type), "loss_type discopop", ("discopop_tau",))
    yield Reader(bends, "f_divergence_type alpha_divergence", ("f_alpha_divergence_coef",))
    yield Reader(adapts, "alpha_schedule adaptive", ("alpha_goal_accuracy",))
    # An alpha of 0, and one that is constant, say what loss_type dpo does.
    yield Reader(weighs_sources or config.alpha == 0, "a loss_type other than dpo", ("alpha",))
    yield Reader(weighs_sources or not rises, "a loss_type other than dpo", ("alpha_schedule",))
    yield Reader(weighs_sources and rises, "an alpha_schedule that rises, without loss_type dpo", ("alpha_start",))
    yield Reader(
        weighs_sources and rises and config.alpha != config.alpha_start,
        "an alpha that changes, without loss_type dpo",
        ("alpha_warmup_ratio",),
    )
    yield Reader(
        config.source_weighting != "rows", "source_weighting reward, margin or accuracy", ("source_temperature",)
    )
    yield Reader(
        config.follows_performance(),
        "source_weighting margin or accuracy, or alpha_schedule adaptive",
        ("performance_decay",),
    )
    yield Reader(precomputes, "reference precompute", ("reference_cache_dir",))
