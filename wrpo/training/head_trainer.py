"""A `transformers.Trainer` whose loss is computed in the model's head; what SFT and WRPO share.

Exact normalisation. The Trainer hands over all micro-batches of an optimizer step at once. Their items (examples or
tokens) are counted together and over all ranks, and each micro-batch's loss is its sum divided by that count. So the
gradient of a step is that of the mean over all its items, however they are dealt out to micro-batches and ranks: DDP,
FSDP and ZeRO average over ranks, and the count is divided by the number of ranks to undo it. Rows that are repeated
because the data does not divide by the ranks weigh nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from wrpo.data.batch import OF_PREFERENCES, check_batch
from wrpo.data.collation import Batch, pad_token
from wrpo.data.model_limits import keep_padding_inside
from wrpo.data.ranks import rows_that_count
from wrpo.head.fused_head import check_fused_head, install_fused_head
from wrpo.head.wrapping import is_partitioned, takes_weights_of_first_process
from wrpo.reference.brought import warn_of_other_rounding
from wrpo.user_error import UserError
from wrpo_kernels.environment import default_backend, default_budget

from .before_training import check_arguments, check_before_training, hub_named, packages_named
from .config import FusedHeadConfig
from .curves import TrainingCurves
from .generation import prepare_generation
from .layout_trainer import LayoutTrainer
from .length_groups import LengthGroupingTrainer
from .metrics import Measured, RunningMeans
from .opening import open_eval_data, open_model, open_tokenizer, open_train_data
from .resuming import ResumingTrainer
from .saving import SavingTrainer
from .start_report import StartReport, data_size


class HeadTrainer(ResumingTrainer, SavingTrainer, LengthGroupingTrainer, LayoutTrainer):
    """Base of `SFTTrainer` and `WRPOTrainer`; `batch_loss` says what the loss is, `item_weight` what it counts."""

    loss_is_scaled_for_ga = True  # by the count of the whole step
    of_batch: tuple[str, ...] = OF_PREFERENCES  # what a batch has at least
    stage = "preference"  # the form of a row that it trains on; the other one is "sft"
    config_class: type[FusedHeadConfig] = FusedHeadConfig

    def __init__(
        self,
        model: Any,
        args: FusedHeadConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        args = self.config_class() if args is None else args
        check_arguments(args, self.config_class, options)
        tokenizer = open_tokenizer(processing_class, model)
        sources = {"train": train_dataset, "eval": eval_dataset}
        train_dataset = open_train_data(train_dataset, tokenizer, args, self.stage)
        eval_dataset = open_eval_data(eval_dataset, tokenizer, args, self.stage)
        model = open_model(model, peft_config)
        if model is not None:
            keep_padding_inside(tokenizer, model)
            warn_of_other_rounding(sources, {"train": train_dataset, "eval": eval_dataset}, model, args)
        with packages_named(f"report_to {args.report_to}"), hub_named(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                data_collator=data_collator or self.collator(args, train_dataset, pad_token(tokenizer, model)),
                **options,
            )
        self.model_accepts_loss_kwargs = True  # what transformers before `loss_is_scaled_for_ga` reads
        is_there = not (is_partitioned(self.model) or takes_weights_of_first_process(self.accelerator))
        install_fused_head(self.model, check=args.check_head and is_there)
        self.unchecked = self.model if args.check_head and not is_there else None  # until it runs wrapped
        prepare_generation(self.model, self.train_dataset, tokenizer)
        check_before_training(self)
        self.open_layout(self.probed_rows())
        self.add_callback(StartReport(self.start_lines))
        self.add_callback(TrainingCurves(draw=args.draw_curves))
        self.train_means, self.eval_means = RunningMeans(), RunningMeans()

    def train(self, *args: Any, **options: Any) -> Any:
        """As the Trainer's.

        Raises:
            UserError: the run ended with weights or a loss that are no numbers.
        """
        output = super().train(*args, **options)
        weights = [name for name, p in self.model.named_parameters() if p.requires_grad and not is_finite(p)]
        bad = torch.tensor(float(bool(weights) or not math.isfinite(output.training_loss)), device=self.args.device)
        if self.accelerator.reduce(bad, "sum").item():  # all ranks stop, or none: a rank of FSDP sees its share alone
            raise UserError(
                f"training ended in NaN or infinity (mean loss {output.training_loss}; not finite: {len(weights)} "
                f"parameters, the first {weights[0] if weights else 'on another process, if any'}). Do not use these "
                "weights: lower learning_rate, set max_grad_norm, and go on from a checkpoint before the first such "
                "loss in the log"
            )
        return output

    def collator(self, args: Any, train_dataset: Any, pad_token_id: int) -> Any:
        """Rows to a batch, where the caller gives no collator of his own."""
        raise NotImplementedError

    def start_lines(self, steps: int) -> list[str]:
        """What the run says of itself before its first step."""
        args = self.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        kernel = args.kernel_backend or default_backend(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        budget = default_budget(args.device) if args.budget_bytes is None else args.budget_bytes
        size = data_size(self.train_dataset)
        return [
            f"data       {'a stream' if size is None else size}",
            f"steps      {steps:,}, each of up to {rows} rows, learning rate {args.learning_rate:g} ({schedule})",
            f"layout     {self.layout_choice}",
            f"kernel     {kernel} on {args.device.type}, logits in pieces of at most {budget / 2**20:.0f} MiB",
        ]

    def datasets(self) -> dict[str, Any]:
        """All data sets by their names in messages, metrics and caches."""
        if isinstance(self.eval_dataset, dict):
            return {"train": self.train_dataset, **{f"eval_{name}": data for name, data in self.eval_dataset.items()}}
        return {"train": self.train_dataset, "eval": self.eval_dataset}

    def filled_datasets(self) -> dict[str, Any]:
        """Those that are given and not empty."""
        return {
            name: data
            for name, data in self.datasets().items()
            if data is not None and (not hasattr(data, "__len__") or len(data))
        }

    def probed_rows(self) -> Any:
        """The rows that models are asked about: those of training, else of the first evaluation; None: no rows."""
        return next(iter(self.filled_datasets().values()), None)

    def metric_names(self, rows: Any) -> list[str]:
        """Of the values that an evaluation on these rows gives."""
        return ["loss"]

    def item_weight(self, batch: Batch) -> Tensor:
        """[B], what each row of the batch weighs in the mean that is the loss."""
        raise NotImplementedError

    def batch_loss(self, model: nn.Module, batch: Batch, count: Tensor | None) -> tuple[Tensor, dict[str, Measured]]:
        """The batch's share of the loss, its sum over rows that are no repeats divided by `count`; and values to log.

        With `count` None (evaluation) the values hold "loss", and the first result is not used.
        """
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step, and the weight of their rows together, over all ranks."""
        batches = [check_batch(batch, self.of_batch) for batch in islice(epoch_iterator, num_batches)]
        if batches:
            batches[-1] = self.with_repeats_marked(batches[-1])
        count = sum((self.counted_weight(batch).sum() for batch in batches), torch.zeros(())).to(device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def with_repeats_marked(self, batch: Batch) -> Batch:
        """The batch that the data loader gave last; `is_counted` [B] where some of its rows are repeats."""
        rows = len(weight := self.item_weight(batch))
        counted = rows_that_count(self.accelerator, rows)
        if counted == rows:
            return batch
        return {**batch, "is_counted": torch.arange(rows, device=weight.device) < counted}

    def counted_weight(self, batch: Batch) -> Tensor:
        """[B], `item_weight`, and 0 of a repeat."""
        weight = self.item_weight(batch)
        return weight * batch["is_counted"] if "is_counted" in batch else weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        self.check_head_through(model)
        weight = self.counted_weight(inputs)
        if num_items_in_batch is None:
            count = weight.sum().clamp(min=1)  # the loss is this rank's own mean
        else:  # over all ranks
            count = num_items_in_batch / self.accelerator.num_processes
        loss, values = self.batch_loss(model, inputs, count)
        if values:
            self.train_means.add(values, weight)
        return (loss, values) if return_outputs else loss

    def check_head_through(self, wrapped: nn.Module) -> None:
        """Once, before the first batch, where the weights were not there when the trainer was built."""
        if self.unchecked is not None:
            model, self.unchecked = self.unchecked, None
            check_fused_head(model, wrapped)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a training line; those of evaluation say "eval_loss"
            logs.update(self.training_values() | self.train_means.pop(self.accelerator))
        super().log(logs, *args, **kwargs)

    def training_values(self) -> dict[str, float]:
        """What a training line of the log holds besides the means."""
        return {}

    def _prepare_input(self, data: Any) -> Any:
        # Moved, never cast: DeepSpeed's half precision would round log-probs of hundreds of nats.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        self.check_head_through(model)
        inputs = self.with_repeats_marked(self._prepare_inputs(check_batch(inputs, self.of_batch)))
        with torch.no_grad():
            _, values = self.batch_loss(model, inputs, None)
        self.eval_means.add(values, self.counted_weight(inputs))
        return values["loss"].value.mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's own loop; its loss is replaced by the exact mean over the data, and the other means join it."""
        self.eval_means.pop(self.accelerator)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.eval_means.pop(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output


def is_finite(parameter: Tensor) -> bool:
    """Of a parameter that FSDP or ZeRO-3 has sharded: this rank's share."""
    own = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
    return not own.is_floating_point() or own.is_meta or bool(own.detach().isfinite().all())
