"""Weighted-Reward Preference Optimization as a `transformers.Trainer`.

    trainer = WRPOTrainer(model, WRPOConfig(output_dir="out"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()

A step: reference log-probs of the batch, alpha of the step and with it the weight of each response, then the model's
forward with `linear_preference_loss` in the place of its logits. Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wrpo.data import PreferenceCollator
from wrpo.data.batch import num_counted, response_lengths
from wrpo.data.collation import Batch
from wrpo.head.attention import model_inputs
from wrpo.head.fused_head import install_fused_head, run_in_head
from wrpo.reference.cache import with_reference
from wrpo.reference.fingerprint import model_fingerprint
from wrpo.reference.fused import FusedReference
from wrpo.reference.reference import (
    AdaptersOff,
    FrozenCopy,
    Reference,
    brings_reference,
    choose_reference,
    from_batch,
    frozen_copy,
    no_reference,
    refuse_partitioned,
    sequence_logp,
)
from wrpo_kernels import PreferenceOutput, linear_preference_loss

from .head_trainer import HeadTrainer
from .metrics import Measured, names_of_metrics, preference_metrics
from .opening import open_model
from .response_weights import response_weights, row_of, sum_by_row
from .schedule import adaptive_alpha, alpha_at
from .source_performance import MEASURES, Measure, RunningPerformance, source_models_of
from .start_report import data_size
from .wrpo_config import WRPOConfig

logger = logging.getLogger("wrpo.reference")


class WRPOTrainer(HeadTrainer):
    """Trainer of the weighted-reward preference loss.

    Args:
        model: the policy: a folder, a hub name, a causal language model of transformers, or a PEFT model. Its weights
            now are the reference.
        args: `WRPOConfig`, or `DPOConfig` for pairs. Default: WRPOConfig().
        train_dataset, eval_dataset: a file, a list or a `datasets.Dataset` of rows in any form of `wrpo.data.forms`, or
            rows of `wrpo.data.tokenize_examples`; eval_dataset may be a dict of several.
        processing_class: the tokenizer, saved with the model; its padding token fills the batches. Default: the one
            that lies with a model given by name.
        peft_config: of an adapter that the model gets; the reference is then the model without it. Default: none.
        ref_model: another model or its name, as the reference, for copy and precompute. Default: the policy before
            training.
        data_collator: rows to a batch. Default: `PreferenceCollator`, which also sees to `empty_response`; without it
            that is checked on the CPU alone.
        **options: of `transformers.Trainer`.

    Logs the values of `wrpo.training.metrics` for training and evaluation, over all ranks, and alpha. To resume, give
    the same model again and `train(resume_from_checkpoint=...)`: the reference stays the model of the first start.
    """

    config_class = WRPOConfig
    train_dataset: Any
    eval_dataset: Any

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

    def open_reference(self, ref_model: nn.Module | None) -> Reference:
        """What gives the reference log-probs of a batch; goes through the data here if they are precomputed."""
        args, options = self.args, self.args.head_options()
        source, is_brought = self.find_reference(ref_model)
        self.reference_source = "of the data" if is_brought else source
        if source == "adapter":
            return AdaptersOff(self.model, **options)
        if source == "none":
            return no_reference
        if is_brought:
            return from_batch
        refuse_partitioned(self.model if ref_model is None else ref_model, source)
        model = ref_model if ref_model is not None else frozen_copy(self.model) if source == "copy" else self.model
        self.place_reference(model, is_own=ref_model is None)
        if ref_model is not None:
            self.agree_on_layout(ref_model, self.probed_rows())
        if source == "copy":
            return FrozenCopy(model, self.accelerator.autocast, args.check_head, **options)
        self.precompute(model)
        return from_batch

    def find_reference(self, ref_model: nn.Module | None) -> tuple[str, bool]:
        """(copy, adapter, precompute or none; whether every data set brings its log-probs along).

        Raises:
            ValueError: `ref_model` or a column `ref_logp` that would not be used; else as `choose_reference`.
        """
        args, datasets = self.args, self.filled_datasets()
        has_length = all(hasattr(data, "__len__") for data in datasets.values())
        bringing = [name for name, data in datasets.items() if brings_reference(data)]
        is_brought = has_length and bool(datasets) and len(bringing) == len(datasets)
        wanted = "copy" if ref_model is not None and args.reference == "auto" else args.reference
        source = choose_reference(wanted, self.model, args.loss_type, has_length=has_length, has_reference=is_brought)
        if ref_model is not None and source in ("adapter", "none"):
            raise ValueError(f"ref_model is given but reference={source!r} does not use it; use copy or precompute")
        if bringing and source != "precompute":
            raise ValueError(
                f"{', '.join(bringing)} of the data sets {', '.join(datasets)}: the column ref_logp would not be used "
                f"by reference={source!r}; use precompute, or remove the column"
            )
        if bringing and not is_brought:
            logger.warning(
                "Only %s of the data sets %s bring the column ref_logp: the reference model computes it for the others",
                ", ".join(bringing), ", ".join(datasets),
            )  # fmt: skip
        return source, is_brought

    def place_reference(self, model: nn.Module, is_own: bool) -> None:
        """On the device: the Trainer never saw `ref_model`, and under FSDP and DeepSpeed leaves its own on the CPU."""
        parts = set((getattr(model, "hf_device_map", None) or {}).values())
        is_spread = len(parts) > 1 or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        if not is_spread and not (is_own and (self.place_model_on_device or self.is_model_parallel)):
            model.to(self.args.device)

    def precompute(self, model: nn.Module) -> None:
        """Give every data set its column `ref_logp`. One that brings the column along keeps it."""
        args = self.args
        install_fused_head(model, check=args.check_head)
        settings = {"mixed_precision": self.accelerator.mixed_precision, "head": str(install_fused_head(model))}
        fingerprint = model_fingerprint(model, self.processing_class, settings)
        folder = Path(args.reference_cache_dir or Path(args.output_dir) / "reference")

        def logp_of(rows: list[dict]) -> Tensor:
            batch = self._prepare_input(self.data_collator(rows))
            with self.accelerator.autocast():
                return sequence_logp(model, batch, **args.head_options())

        lacking = [name for name, data in self.filled_datasets().items() if not brings_reference(data)]
        done = {
            name: data
            if name not in lacking
            else with_reference(
                data,
                folder / f"{name}.safetensors",
                fingerprint,
                logp_of,
                batch_size=args.per_device_eval_batch_size,
                accelerator=self.accelerator,
                progress=not args.disable_tqdm,
            )
            for name, data in self.datasets().items()
        }
        self.train_dataset = done.pop("train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = dict(zip(self.eval_dataset, done.values(), strict=True))
        else:
            (self.eval_dataset,) = done.values()

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
        args = self.args
        return [
            *super().start_lines(steps),
            f"loss       {args.loss_type}, beta {args.beta:g}, {self.alpha_line()}",
            f"reference  {self.reference_source}",
        ]

    def alpha_line(self) -> str:
        """What alpha does in this run, as far as its rows are known."""
        args, size = self.args, data_size(self.train_dataset)
        if unused := args.unused_role():
            return f"without the {unused}s of rows that have other preferred answers"
        if size is not None and not any("source" in kind and "target" in kind for kind in size.rows):
            return "no alpha: no row has both a source and a target"
        if args.alpha_schedule == "constant":
            return f"alpha {args.alpha:g}"
        return f"alpha {args.alpha_start:g} to {args.alpha:g} ({args.alpha_schedule})"

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
            **self.args.head_options(),
            "cu_seqlens": batch.get("cu_seqlens"),
            "num_rows": num_counted(batch),
            "seq_weight": weights,
            "group": row_of(batch),
            "num_groups": len(batch["num_responses"]),
            # -log pi of the preferred responses, each by its weight in the chosen reward.
            "nll_weight": self.args.nll_weight and self.args.nll_weight * preferred,
            "group_weight": None if counted is None else counted.float(),
            "normalizer": count,
            "reduction": "none" if count is None else "mean",
        }

        def head_fn(hidden: Tensor, weight: Tensor, **head: Any) -> PreferenceOutput:
            return linear_preference_loss(hidden, weight, labels, ref_logp, **options, **head)

        return run_in_head(model, head_fn, **model_inputs(batch))

    def training_values(self) -> dict[str, float]:
        shares = self.performance.logged() if self.args.source_weighting in MEASURES else {}
        return {"alpha": float(self.last_alpha), **shares}
