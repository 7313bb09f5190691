"""The settings of preference optimisation: what each means, its unit, its default and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wrpo.reference.fused import Fusion
from wrpo.settings import check_range, knob

from .config import FusedHeadConfig
from .idle_settings import refuse_idle_settings
from .inherited_fields import check_numbers
from .loss_names import REFERENCE_FREE, DivergenceName, Losses, check_losses, losses_of, only_name
from .schedule import Schedule
from .source_performance import MEASURES, Measure


@dataclass
class WRPOConfig(FusedHeadConfig):
    """Weighted-Reward Preference Optimization.

    With r(y) = beta * (log pi(y|x) - log pi_ref(y|x)) and sources weighted by their shares q_k,

        m = alpha * sum_k q_k r(source_k) + (1 - alpha) * r(target) - r(rejected) - gamma

    Settings of the paper's variants: WRPO_IPO loss_type ipo, beta 0.01, alpha 0.1, learning_rate 1e-6;
    WRPO_SimPO loss_type simpo, which sets beta 10 and gamma 0, alpha 0.5, learning_rate 6e-7.
    """

    learning_rate: float = knob(3e-7, "Peak learning rate. Default: 3e-7 (paper).", group="training")
    alpha: float = knob(
        0.1,
        "Fusion coefficient at the end: share of the source in the chosen reward. Default: 0.1 (paper).",
        group="loss",
    )
    alpha_start: float = knob(0.0, "Fusion coefficient at the start. Default: 0 (paper).", group="loss")
    alpha_schedule: Literal[Schedule, "adaptive"] = knob(
        "linear",
        "How alpha rises: linear, cosine, constant at `alpha`, or adaptive: from alpha_start to alpha as the running "
        "share a of rows whose target answer beats the rejected one goes from 1/2 to alpha_goal_accuracy, alpha_start "
        "+ (alpha - alpha_start) * clip((a - 1/2) / (alpha_goal_accuracy - 1/2), 0, 1). Default: linear (paper).",
        group="loss",
    )
    alpha_goal_accuracy: float = knob(
        0.75,
        "Running accuracy of the target at which an adaptive alpha is at its end, in (0.5, 1]. Default: 0.75.",
        group="loss",
    )
    alpha_warmup_ratio: float = knob(
        1.0, "Share of training over which alpha rises. Default: 1, all of it (paper).", group="loss"
    )
    source_weighting: Literal["rows", "reward", Measure] = knob(
        "rows",
        "The shares q_k of several sources. rows: source_weight of the data, equal where it has none; reward: "
        "softmax(source_reward / source_temperature) over the row's sources; margin, accuracy: source_weight times "
        "exp(s / source_temperature), to sum 1, with s the running mean of r(source) - r(rejected), or of the share of "
        "rows where it is above 0, over the rows of the source's model (see training/source_performance.py). Default: "
        "rows (paper: one source).",
        group="loss",
    )
    source_temperature: float = knob(
        1.0,
        "Temperature of the shares, in units of the reward, margin or accuracy that they follow. Default: 1.",
        group="loss",
    )
    performance_decay: float = knob(
        0.9,
        "What a row counts in a running mean one optimizer step later, in [0, 1); the mean reaches back about "
        "1 / (1 - this) steps. For source_weighting margin and accuracy, and alpha_schedule adaptive. Default: 0.9.",
        group="loss",
    )
    beta: float | None = knob(
        None,
        "Scale of the implicit reward, 1/nats; for ipo the paper's tau. Default: 0.01, for simpo 10 (paper); for cpo "
        "and orpo 0.1.",
        group="loss",
    )
    gamma: float | None = knob(
        None, "Margin that the chosen reward must win by, in units of reward. Default: 0 (paper).", group="loss"
    )
    loss_type: Losses = knob(
        "sigmoid",
        "sigmoid: -log sigmoid(m), the paper's; hinge: max(0, 1 - m); ipo: ((m - 1/2) / beta)^2; simpo: sigmoid with "
        "each log-prob divided by its length and no reference; dpo: sigmoid with alpha 0, where a row that has a "
        "target leaves its sources out; cpo: sigmoid without a reference, and sft; orpo: the odds ratio without a "
        "reference, and sft. The other names are TRL's, with formulas in docs/losses.md; ipo_norm is TRL's ipo. "
        "Several names, in a file or in Python a list of them, are losses that are added up. Default: sigmoid.",
        group="loss",
    )
    loss_weights: list[float] | None = knob(
        None, "A factor >= 0 for each loss of loss_type; for cpo and orpo two. Default: 1 each.", group="loss"
    )
    loss_label_smoothing: float = knob(
        0.0,
        "Probability that a preference is flipped, in [0, 0.5); sigmoid losses, robust, aot, and exo_pair, which needs "
        "one (its paper: 0.001). Default: 0 (paper).",
        group="loss",
    )
    discopop_tau: float = knob(0.05, "Temperature of discopop's mixture. Default: 0.05, its paper's.", group="loss")
    f_divergence_type: DivergenceName = knob(
        "reverse_kl",
        "The divergence that keeps the policy at its reference, for the losses of one margin; the rewards in the log "
        "stay beta times the log-ratio. Default: reverse_kl, DPO's.",
        group="loss",
    )
    f_alpha_divergence_coef: float = knob(0.5, "alpha of alpha_divergence. Default: 0.5.", group="loss")
    nll_weight: float = knob(
        0.0,
        "Weight of -log pi of the preferred responses beside the preference loss, shared among them as the chosen "
        "reward is: alpha * q_k a source, 1 - alpha the target. -log pi is a sum over tokens, or with length_normalize "
        "their mean. Default: 0.",
        group="loss",
    )
    ld_alpha: float | None = knob(
        None,
        "Weight of the tokens beyond the length of the row's shortest response, in [0, 1], in log pi and log pi_ref "
        "(LD-DPO, arXiv:2409.06411). Default: none, all tokens weigh 1.",
        group="loss",
    )
    use_weighting: bool = knob(
        False,
        "Multiply each row's preference loss by how likely its responses are under the policy (WPO, arXiv:2406.11827; "
        "training/on_policy_weight.py); two more products of the head. Default: False.",
        group="loss",
    )
    length_normalize: bool = knob(
        False,
        "Divide each response's log-ratio by its number of tokens. Default: False (paper); simpo always does, "
        "sigmoid_norm, ipo_norm and orpo in their loss alone.",
        group="loss",
    )
    reference: Literal["auto", "copy", "adapter", "precompute", "none"] = knob(
        "auto",
        "Where reference log-probs come from. copy: a frozen copy of the model. adapter: the PEFT model with its "
        "adapters off. precompute: once before training, kept on disk. none: reference-free. auto: none for simpo, "
        "cpo and orpo; adapter if the adapters are fresh; else precompute, or copy where the data has no length. Under "
        "FSDP and DeepSpeed precompute goes through the wrapped policy; copy keeps the whole model, in shards under "
        "FSDP. Default: auto.",
        group="reference",
    )
    reference_cache_dir: str | None = knob(
        None, "Folder of the precomputed reference log-probs. Default: `reference` in output_dir.", group="reference"
    )
    sync_ref_model: bool = knob(
        False,
        "Move the reference towards the policy while training (TR-DPO, arXiv:2404.09656): every ref_model_sync_steps "
        "steps reference = a * policy + (1 - a) * reference, a = ref_model_mixup_alpha. The reference is then a copy; "
        "not for adapters, FSDP and DeepSpeed. Default: False.",
        group="reference",
    )
    ref_model_mixup_alpha: float = knob(0.6, "a of sync_ref_model, in (0, 1]. Default: 0.6.", group="reference")
    ref_model_sync_steps: int = knob(
        512, "Optimizer steps from one move of the reference to the next. Default: 512.", group="reference"
    )
    reference_fusion: Literal["none", Fusion] = knob(
        "none",
        "Put the source models' own log-probs, column source_logp, into the reference (InfiFPO, arXiv:2505.13878): a "
        "response's mean log-prob a token under each source, clipped at the policy's (from below if preferred, from "
        "above if rejected), then max_margin: the source farthest from the policy; average; or confidence: weights "
        "proportional to 1 / -log-prob. Needs length_normalize; the paper's beta for it is 2.5. Default: none.",
        group="reference",
    )
    empty_response: Literal["raise", "zero"] = knob(
        "raise",
        "A response without a token to count. raise: an error; zero: its row counts nothing and leaves the mean. "
        "Default: raise.",
        group="data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = only_name(self.loss_type)
        beta, gamma = self.default_scale()
        self.beta = beta if self.beta is None else self.beta
        self.gamma = gamma if self.gamma is None else self.gamma
        check_numbers(self, "alpha", "alpha_start", "alpha_warmup_ratio", low=0, high=1)
        check_numbers(self, "beta", "source_temperature", low=0, open_low=True)
        check_numbers(self, "gamma", "f_alpha_divergence_coef")
        check_numbers(self, "discopop_tau", low=0, open_low=True)
        check_range(self, "ld_alpha", low=0, high=1)
        check_numbers(self, "ref_model_mixup_alpha", low=0, high=1, open_low=True)
        check_numbers(self, "ref_model_sync_steps", low=1)
        check_numbers(self, "nll_weight", low=0)
        check_numbers(self, "alpha_goal_accuracy", low=0.5, high=1, open_low=True)
        check_numbers(self, "performance_decay", low=0, high=1, open_high=True)
        check_numbers(self, "loss_label_smoothing", low=0, high=0.5, open_high=True)
        smoothing, divergence = self.loss_label_smoothing, self.f_divergence_type
        check_losses(self.loss_type, self.loss_weights, self.gamma, smoothing, divergence, self.reference)
        if self.sync_ref_model and (self.reference not in ("auto", "copy") or self.loss_type in REFERENCE_FREE):
            raise ValueError(
                f"sync_ref_model moves a copy: reference must be copy (or auto) and the loss one that has a reference, "
                f"got {self.reference!r} and loss_type {self.loss_type!r}"
            )
        self._check_token_weights()
        self._check_weights_that_adapt()
        refuse_idle_settings(self)

    def _check_token_weights(self) -> None:
        losses = losses_of(self.loss_type)
        of_batch = [name for name in losses if name in ("aot", "aot_unpaired", "sft", "orpo")]
        if self.use_weighting and of_batch:
            raise ValueError(f"use_weighting weighs rows, but loss_type {of_batch[0]!r} is of all rows together")
        of_tokens = [name for name in losses if name in ("sft", "orpo")] + ["nll_weight"] * bool(self.nll_weight)
        if self.ld_alpha is not None and of_tokens:
            raise ValueError(f"ld_alpha is of log-ratios; {of_tokens[0]} is a likelihood, whose tokens all weigh 1")
        if self.ld_alpha is not None and self.reference_fusion != "none":
            raise ValueError(
                "ld_alpha and reference_fusion cannot be had together: source_logp is a sum over all tokens"
            )

    def default_scale(self) -> tuple[float, float]:
        """beta and gamma where nobody sets them. SimPO's log-probs are means over tokens, which beta makes up for."""
        if self.loss_type in ("cpo", "orpo"):
            return 0.1, 0.0
        return (10.0, 0.0) if self.loss_type == "simpo" else (0.01, 0.0)

    def _check_weights_that_adapt(self) -> None:
        adaptive, no_alpha = self.alpha_schedule == "adaptive", self.unused_role() == "source"
        fused = self.reference_fusion != "none"
        contradictions = {
            "alpha_warmup_ratio is a share of the steps, which alpha_schedule 'adaptive' does not go by": (
                adaptive and self.alpha_warmup_ratio != 1
            ),
            "alpha_schedule 'adaptive' would change nothing: alpha is 0 throughout": adaptive and no_alpha,
            f"source_weighting {self.source_weighting!r} would change nothing: alpha is 0 throughout": (
                no_alpha and self.source_weighting != "rows"
            ),
            f"reference_fusion needs the policy's own reference, which reference 'none' and loss_type "
            f"{', '.join(map(repr, REFERENCE_FREE))} lack": (
                fused and (self.reference == "none" or self.loss_type in REFERENCE_FREE)
            ),
            "reference_fusion compares log-probs a token; set length_normalize to true": (
                fused and not self.length_normalize
            ),
        }
        for words, holds in contradictions.items():
            if holds:
                raise ValueError(words)

    def unused_role(self) -> str | None:
        """The preferred role that weighs nothing in any step, where a row has the other one too."""
        ends = {self.alpha} if self.alpha_schedule == "constant" else {self.alpha, self.alpha_start}
        if self.loss_type == "dpo" or ends == {0.0}:
            return "source"
        return "target" if ends == {1.0} else None

    def follows_performance(self) -> bool:
        """Whether a weight depends on the running means of `wrpo.training.source_performance`."""
        return self.source_weighting in MEASURES or self.alpha_schedule == "adaptive"

    def loss_options(self) -> dict:
        """The loss that the fields single out: keyword arguments of `linear_wrpo_loss`."""
        return {
            "beta": self.beta,
            "gamma": self.gamma,
            "loss_type": losses_of(self.loss_type),
            "loss_weights": self.loss_weights,
            "label_smoothing": self.loss_label_smoothing,
            "discopop_tau": self.discopop_tau,
            "f_divergence_type": self.f_divergence_type,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
            "length_normalize": self.length_normalize or self.loss_type == "simpo",
            "empty": self.empty_response,
        }


@dataclass
class DPOConfig(WRPOConfig):
    """Direct Preference Optimization on pairs: `WRPOConfig` with the defaults that DPO users know, and alpha 0.

    m = r(chosen) - r(rejected) - gamma; a row that has an answer of the target leaves its sources' out.
        Source: DPO, arXiv:2305.18290; defaults as in TRL's DPOConfig. SimPO, arXiv:2405.14734, and the defaults of its
        code.
    """

    learning_rate: float = knob(1e-6, "Peak learning rate. Default: 1e-6.", group="training")
    beta: float | None = knob(
        None,
        "Scale of the implicit reward, 1/nats; for ipo the paper's tau. Default: 0.1, for simpo 2.",
        group="loss",
    )
    gamma: float | None = knob(
        None, "Margin that the chosen reward must win by, in units of reward. Default: 0, for simpo 0.5.", group="loss"
    )
    alpha: float = knob(
        0.0, "0: of a row with an answer of the target the sources' do not count. Default: 0.", group="loss"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha or self.alpha_start:
            raise ValueError(
                f"alpha and alpha_start must be 0 for DPO, got {self.alpha} and {self.alpha_start}; with an alpha it "
                "is WRPO: wrpo train, in Python WRPOConfig"
            )

    def default_scale(self) -> tuple[float, float]:
        return (2.0, 0.5) if self.loss_type == "simpo" else (0.1, 0.0)
