"""Weighted-Reward Preference Optimization as a `transformers.Trainer`.

    trainer = WRPOTrainer(model, WRPOConfig(output_dir="out"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()

A step: reference log-probs of the batch, alpha of the step and with it the weight of each response, then the model's
forward with `linear_preference_loss` in the place of its logits. Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wrpo.data import PreferenceCollator
from wrpo.data.batch import (
    group_of,
    lengths_on_host,
    num_counted,
    response_lengths,
    row_of,
    sum_by_response,
    tail_weight,
)
from wrpo.data.collation import Batch
from wrpo.head.attention import model_inputs
from wrpo.head.fused_head import run_in_head
from wrpo.reference.fused import FusedReference
from wrpo_kernels import PreferenceOutput, linear_preference_loss, linear_token_logp, preference_loss

from .loss_names import names_in
from .metrics import Measured, names_of_metrics, preference_metrics
from .on_policy_weight import on_policy_weight
from .opening import open_model
from .reference_trainer import ReferenceTrainer
from .response_weights import response_weights, sum_by_row
from .schedule import adaptive_alpha, alpha_at
from .source_performance import MEASURES, Measure, RunningPerformance, source_models_of
from .start_report import data_size
from .wrpo_config import WRPOConfig


class WRPOTrainer(ReferenceTrainer):
    """Trainer of the weighted-reward preference loss.

    Args:
        model: the policy: a folder, a hub name, a causal language model of transformers, or a PEFT model. Its weights
            now are the reference; leave them alone until training has begun.
        args: `WRPOConfig`, or `DPOConfig` for pairs. Default: WRPOConfig().
        train_dataset, eval_dataset: a file, a list or a `datasets.Dataset` of rows in any form of `wrpo.data.forms`, or
            rows of `wrpo.data.tokenize_examples`; eval_dataset may be a dict of several.
        processing_class: the tokenizer, saved with the model; its padding token fills the batches. Default: the one
            that lies with a model given by name.
        peft_config: of an adapter that the model gets; the reference is then the model without it. Default: none.
        ref_model: another model or its name, as the reference, for copy and precompute. Default: the policy before
            training.
        data_collator: rows to a batch. Default: `PreferenceCollator`, which also sees to `empty_response`; without it
            that is checked on the CPU alone. One of your own hands the rows' `ref_logp` or `ref_place` on, [S].
        **options: of `transformers.Trainer`.

    Logs the values of `wrpo.training.metrics` for training and evaluation, over all ranks, and alpha. To resume, give
    the same model again and `train(resume_from_checkpoint=...)`: the reference stays the model of the first start.
    Another one is refused, and other settings are said in the log.
    """

    config_class = WRPOConfig

    def __init__(
        self,
        model: Any,
        args: WRPOConfig | None = None,
        *,
        ref_model: Any = None,
        data_collator: Any = None,
        **options: Any,
    ):
        super().__init__(model, args, data_collator=data_collator, **options)
        args = self.args
        if args.source_weighting == "reward" and data_collator is not None:
            raise ValueError("source_weighting='reward' is the work of PreferenceCollator: give it reward_temperature")
        if args.follows_performance():
            names: list[str] = []
            measure: Measure = "accuracy"  # where alpha alone follows
            if args.source_weighting in MEASURES:
                measure = args.source_weighting
                own = getattr(self.data_collator, "source_models", None)
                names = source_models_of(self.train_dataset) if own is None else own
            self.add_callback(RunningPerformance(names, measure, args.source_temperature, args.performance_decay))
        self.last_alpha = self.alpha()
        self.reference = self.open_reference(open_model(ref_model, None))
        if args.reference_fusion != "none":
            self.reference = FusedReference(self.reference, args.reference_fusion)

    def collator(self, args: WRPOConfig, train_dataset: Any, pad_token_id: int) -> PreferenceCollator:
        return PreferenceCollator(
            pad_token_id,
            empty_response=args.empty_response,
            reward_temperature=args.source_temperature if args.source_weighting == "reward" else None,
            source_models=source_models_of(train_dataset) if args.source_weighting in MEASURES else None,
            with_source_logp=args.reference_fusion != "none",
        )

    @property
    def performance(self) -> RunningPerformance:
        """The running means, where a weight follows them; looked up, since resuming may put another into its place."""
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, RunningPerformance))

    def alpha(self) -> float | Tensor:
        """The fusion coefficient of the present optimizer step; the final one where nothing is being trained."""
        args, state = self.args, self.state
        if args.loss_type == "dpo":
            return 0.0
        if args.alpha_schedule == "adaptive":
            if not state.max_steps:
                return args.alpha
            accuracy = self.performance.target_accuracy()
            return adaptive_alpha(accuracy, start=args.alpha_start, end=args.alpha, goal=args.alpha_goal_accuracy)
        return alpha_at(
            state.global_step / state.max_steps if state.max_steps else 1.0,
            schedule=args.alpha_schedule,
            start=args.alpha_start,
            end=args.alpha,
            warmup_ratio=args.alpha_warmup_ratio,
        )

    def start_lines(self, steps: int) -> list[str]:
        args, losses = self.args, " + ".join(names_in(self.args.loss_type))
        return [
            *super().start_lines(steps),
            f"loss       {losses}, beta {args.beta:g}, gamma {args.gamma:g}{self.alpha_words()}",
            f"reference  {self.reference_source}",
        ]

    def alpha_words(self) -> str:
        """What alpha does in this run, as far as its rows are known; nothing where no row has a source."""
        args, size = self.args, data_size(self.train_dataset)
        if size is None and (unused := args.unused_role()):
            return f", without the {unused}s of rows that have other preferred answers"
        if size is not None and not any("source" in kind for kind in size.rows):
            return ""
        if size is not None and not any("source" in kind and "target" in kind for kind in size.rows):
            return ", no alpha: no row has both a source and a target"
        if args.alpha_schedule == "constant":
            return f", alpha {args.alpha:g}"
        return f", alpha {args.alpha_start:g} to {args.alpha:g} ({args.alpha_schedule})"

    def metric_names(self, rows: Any) -> list[str]:
        return [*super().metric_names(rows), *names_of_metrics(rows)]

    def item_weight(self, batch: Batch) -> Tensor:
        """1 for each row, 0 if one of its responses has no token to count."""
        is_empty = (response_lengths(batch) == 0).float()  # [S]
        return (sum_by_row(is_empty, batch) == 0).float()

    def batch_loss(self, model: nn.Module, batch: Batch, count: Tensor | None) -> tuple[Tensor, dict[str, Measured]]:
        alpha = self.alpha()
        if self.args.source_weighting in MEASURES:
            batch = {**batch, "share": self.performance.shares(batch)}
        out = self.forward_loss(model, batch, alpha, count)
        values = preference_metrics(out.logp, out.reward, batch, alpha)
        if count is None:
            loss = Measured(out.loss, torch.ones_like(out.loss, dtype=torch.bool))
            return out.loss.sum(), {"loss": loss, **values}
        self.last_alpha = alpha
        if self.args.follows_performance():
            self.performance.add(out.reward, batch, self.counted_weight(batch))
        return out.loss, values

    def forward_loss(
        self, model: nn.Module, batch: Batch, alpha: float | Tensor, count: Tensor | None
    ) -> PreferenceOutput:
        """The loss of a batch divided by `count`, or without it the loss of each row [B]."""
        labels, weights = batch["labels"], response_weights(batch, alpha)
        ref_logp = self.reference(model, batch)
        counted, preferred = batch.get("is_counted"), weights.clamp(min=0.0)  # [B], None: all rows; [S]
        if counted is not None:
            preferred = preferred * counted[row_of(batch)]
        options = {
            **self.args.loss_options(),
            "seq_weight": weights,
            "num_groups": len(batch["num_responses"]),
            # -log pi of the preferred responses, each by its weight in the chosen reward.
            "nll_weight": self.args.nll_weight and self.args.nll_weight * preferred,
            "group_weight": None if counted is None else counted.float(),
            "normalizer": count,
            "reduction": "none" if count is None else "mean",
        }
        of_head = {**self.args.head_options(), "num_rows": num_counted(batch)}

        def head_fn(hidden: Tensor, weight: Tensor, **head: Any) -> PreferenceOutput:
            if self.args.use_weighting:
                on_policy = on_policy_weight(hidden, weight, batch, weights, **self.args.head_options(), **head)
                options["group_weight"] = on_policy if counted is None else on_policy * counted
            if self.args.ld_alpha is not None:
                rows = linear_token_logp(hidden, weight, labels, **of_head, **head)
                logp = sum_by_response(rows * tail_weight(batch, self.args.ld_alpha), batch).float()
                return preference_loss(logp, ref_logp, group=row_of(batch), length=response_lengths(batch), **options)
            layout = {
                "cu_seqlens": batch.get("cu_seqlens"),
                "lengths": lengths_on_host(batch),
                "group": group_of(batch),
            }
            return linear_preference_loss(hidden, weight, labels, ref_logp, **options, **layout, **of_head, **head)

        return run_in_head(model, head_fn, **model_inputs(batch))

    def training_values(self) -> dict[str, float]:
        shares = self.performance.logged() if self.args.source_weighting in MEASURES else {}
        return {"alpha": float(self.last_alpha), **shares}
