"""A trainer whose loss compares the policy with a reference: where the reference comes from in this run."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from wrpo.data.batch import check_batch
from wrpo.data.model_limits import refuse_beyond
from wrpo.head.fused_head import install_fused_head
from wrpo.head.wrapping import arithmetic_of_wrapper, is_partitioned, takes_weights_of_first_process
from wrpo.reference.cache import ReferenceFile
from wrpo.reference.fingerprint import model_fingerprint, refuse_unequal
from wrpo.reference.precomputed import Precomputed
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

from .head_trainer import HeadTrainer
from .loss_names import REFERENCE_FREE
from .moving_reference import MovingReference

logger = logging.getLogger("wrpo.reference")

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what DeepSpeed casts all parameters to


class ReferenceTrainer(HeadTrainer):
    """Base of `WRPOTrainer`: `open_reference` says what gives the reference log-probs of a batch."""

    args: Any
    train_dataset: Any
    eval_dataset: Any
    moving: MovingReference | None = None
    ref_model_fingerprint: str | None = None

    def open_reference(self, ref_model: nn.Module | None) -> Reference:
        """What gives the reference log-probs of a batch; goes through the data here if they are precomputed."""
        options = self.reference_options()
        if ref_model is not None:
            self.check_reference(ref_model)
            self.ref_model_fingerprint = model_fingerprint(ref_model, None, {})["model"]
        source, is_brought = self.find_reference(ref_model)
        self.reference_source = "of the data" if is_brought else source
        if source == "adapter":
            return AdaptersOff(self.model, **options)
        if source == "none":
            return no_reference
        if is_brought:
            return from_batch
        if source == "copy":
            reference = self.copy_reference(ref_model)
            if self.args.sync_ref_model:
                self.let_move(reference.model)
            return reference
        return self.precompute(ref_model)

    def reference_options(self) -> dict:
        """How log-probs of a reference are made: keyword arguments of `sequence_logp`."""
        return {**self.args.head_options(), "ld_alpha": self.args.ld_alpha}

    def reference_facts(self) -> dict[str, Any]:
        return {"reference_source": self.reference_source, "ref_model": self.ref_model_fingerprint}

    def find_reference(self, ref_model: nn.Module | None) -> tuple[str, bool]:
        """(copy, adapter, precompute or none; whether every data set brings its log-probs along).

        Raises:
            ValueError: `ref_model` or a column `ref_logp` that would not be used; else as `choose_reference`.
        """
        args, datasets = self.args, self.filled_datasets()
        has_length = all(hasattr(data, "__len__") for data in datasets.values())
        bringing = [name for name, data in datasets.items() if brings_reference(data)]
        is_brought = has_length and bool(datasets) and len(bringing) == len(datasets)
        is_copy = ref_model is not None or args.sync_ref_model
        wanted = "copy" if is_copy and args.reference == "auto" else args.reference
        wanted = "none" if args.loss_type in REFERENCE_FREE else wanted
        source = choose_reference(wanted, self.model, has_length=has_length, has_reference=is_brought)
        (source,) = broadcast_object_list([source])  # where the first process alone has loaded the weights, it decides
        if ref_model is not None and source in ("adapter", "none"):
            raise ValueError(f"ref_model is given but reference={source!r} does not use it; use copy or precompute")
        if bringing and args.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha weighs tokens, but ref_logp of {', '.join(bringing)} is a sum; remove the column"
            )
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

    def check_reference(self, ref_model: nn.Module) -> None:
        """Raises ValueError for the policy itself, which is trained, and for rows beyond the other model's tables."""
        policy: Any = self.model
        if ref_model in (policy, policy.get_base_model() if hasattr(policy, "get_base_model") else policy):
            raise ValueError(
                "ref_model is the model that is trained: leave it out, and the reference is the model before training"
            )
        for name, rows in self.filled_datasets().items():
            refuse_beyond(rows, ref_model, self.processing_class, place=f"{name} data, ref_model")

    def copy_reference(self, ref_model: nn.Module | None) -> FrozenCopy:
        """Of the policy, or the other model; sharded as the policy will be, and run in the same arithmetic."""
        model = frozen_copy(self.model) if ref_model is None else ref_model
        refuse_partitioned(model, "copy")
        if self.accelerator.num_processes > 1 and not takes_weights_of_first_process(self.accelerator):
            refuse_unequal(gather_object([model_fingerprint(model, None, {})]))
        model.requires_grad_(False)
        check = self.args.check_head and not takes_weights_of_first_process(self.accelerator)
        install_fused_head(model, check=check)
        is_wrapped = arithmetic_of_wrapper(self.accelerator) is not None
        if not is_wrapped or self.is_deepspeed_enabled:
            self.place_reference(model, is_own=ref_model is None)
        if ref_model is not None:
            self.agree_on_layout(model, self.probed_rows())
        if not is_wrapped:
            return FrozenCopy(model, self.accelerator.autocast, **self.reference_options())
        if self.is_deepspeed_enabled:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(HALVES.get(self.accelerator.mixed_precision, parameter.dtype))
        elif self.accelerator.is_fsdp2:
            model = fsdp2_prepare_model(self.accelerator, model)
        else:
            model = self.accelerator.prepare_model(model)
            self.accelerator._models.remove(model)  # those are trained
        return FrozenCopy(model, nullcontext, **self.reference_options())

    def let_move(self, reference: nn.Module) -> None:
        """Raises ValueError for weights that cannot be mixed one by one: of adapters, or spread over ranks."""
        policy: Any = self.model
        if hasattr(policy, "disable_adapter"):
            raise ValueError("sync_ref_model mixes weights, which for an adapter's two factors is no mixture of models")
        if arithmetic_of_wrapper(self.accelerator) is not None:
            raise ValueError("sync_ref_model does not know weights that FSDP or DeepSpeed hold")
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (policy, reference)]
        if shapes[0] != shapes[1]:
            raise ValueError("sync_ref_model mixes the weights of ref_model and model, which are of different shapes")
        args = self.args
        self.moving = MovingReference(reference, args.ref_model_mixup_alpha, args.ref_model_sync_steps)
        self.add_callback(self.moving)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.moving is not None and _internal_call and self.args.should_save and output_dir:  # a checkpoint
            self.moving.save(output_dir)  # first: a checkpoint that has weights has the reference too
        super().save_model(output_dir, _internal_call=_internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.moving is not None:
            self.moving.load(resume_from_checkpoint)

    def place_reference(self, model: nn.Module, is_own: bool) -> None:
        """On the device: the Trainer never saw `ref_model`, and under FSDP and DeepSpeed leaves its own on the CPU."""
        parts = set((getattr(model, "hf_device_map", None) or {}).values())
        is_spread = len(parts) > 1 or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        if not is_spread and not (is_own and (self.place_model_on_device or self.is_model_parallel)):
            model.to(self.args.device)

    def precompute(self, ref_model: nn.Module | None) -> Precomputed:
        """Give every data set its places in the table of reference log-probs. One that brings its own keeps them.

        The table is filled here if the model runs now as it will run in training. Else it is filled through the wrapped
        policy, when the first batch asks for it.
        """
        args, model = self.args, self.model if ref_model is None else ref_model
        wrapper = arithmetic_of_wrapper(self.accelerator)
        waits = ref_model is None and wrapper is not None
        if not waits:
            if not is_partitioned(model):
                self.place_reference(model, is_own=ref_model is None)
            install_fused_head(model, check=args.check_head and not is_partitioned(model))
        if ref_model is not None:
            self.agree_on_layout(ref_model, self.probed_rows())
        settings = {"mixed_precision": self.accelerator.mixed_precision, "head": str(install_fused_head(model))}
        if waits:
            settings["wrapper"] = str(wrapper)
        if args.ld_alpha is not None:
            settings["ld_alpha"] = str(args.ld_alpha)
        if args.logits_dtype is not None:
            settings["logits_dtype"] = args.logits_dtype
        reference = Precomputed(
            partial(self.logp_of_rows, waits=waits),
            batch_size=args.per_device_eval_batch_size,
            progress=not args.disable_tqdm,
            has_trained=lambda: self.state.global_step > 0,
        )
        self.give_places(reference, model_fingerprint(model, self.processing_class, settings), waits)
        if not waits and not reference.is_complete():
            refuse_partitioned(model, "precompute")
            reference.fill(model)
        return reference

    def logp_of_rows(self, model: nn.Module, rows: list[dict], *, waits: bool) -> Tensor:
        """[S], in the arithmetic of training: of the wrapped policy's own, or of autocast around another model."""
        batch = self._prepare_input(check_batch(self.data_collator(rows), self.of_batch))
        with nullcontext() if waits else self.accelerator.autocast():
            return sequence_logp(model, batch, **self.reference_options())

    def give_places(self, reference: Precomputed, fingerprint: dict[str, str], waits: bool) -> None:
        """In the table, to each data set that does not bring its own log-probs."""
        folder = Path(self.args.reference_cache_dir or Path(self.args.output_dir) / "reference")
        lacking = [name for name, data in self.filled_datasets().items() if not brings_reference(data)]
        of_first = waits and takes_weights_of_first_process(self.accelerator)
        done = {
            name: data
            if name not in lacking
            else reference.add(
                ReferenceFile(data, folder / f"{name}.safetensors", fingerprint, self.accelerator, of_first)
            )
            for name, data in self.datasets().items()
        }
        self.train_dataset = done.pop("train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = dict(zip(self.eval_dataset, done.values(), strict=True))
        else:
            (self.eval_dataset,) = done.values()
