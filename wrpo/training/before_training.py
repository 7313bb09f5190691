"""What would fail hours into a run, or at its end, is refused before its first pass over the data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from wrpo.data.model_limits import refuse_beyond
from wrpo.head.fused_head import adapts_tied_weight
from wrpo.reference.reference import brings_reference
from wrpo.spelling import nearest
from wrpo.user_error import in_one_line
from wrpo_kernels import linear_simpo_loss

from .saving import refuse_unsaveable

logger = logging.getLogger("wrpo.head")

OF_TRAINER = ("runtime", "samples_per_second", "steps_per_second")  # what it adds to the values of an evaluation
OF_MODEL = {"params", "model", "optimizer_dict"}  # options of optimizers that transformers makes of the whole model
LONGEST = 400  # characters of another program's words


def check_arguments(args: Any, config_class: Any, options: dict[str, Any]) -> None:
    """Raises TypeError for settings of another class, ValueError for options of `Trainer` that no trainer here has, for
    several GPUs in one process, and for a kernel that cannot run.
    """
    if not isinstance(args, config_class):
        raise TypeError(f"args must be {config_class.__name__}, got {type(args).__name__}")
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(f"{name} needs logits, which never exist here; the metrics are in the log instead")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process a GPU with "
            f"`torchrun --nproc_per_node {args.n_gpu} ...`, or show this process one GPU with CUDA_VISIBLE_DEVICES"
        )
    if args.kernel_backend is not None:
        check_backend(args.kernel_backend, args.device)


def check_backend(name: str, device: torch.device) -> None:
    """Raises ValueError if the backend that was named cannot run there; now rather than in the first step."""
    try:
        hidden = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device=device)
        linear_simpo_loss(hidden, hidden[0], torch.zeros_like(hidden[..., 0], dtype=torch.int64), backend=name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"kernel_backend={name!r}: {error}. Leave it out for the best that runs here") from error


def warn_of_tied_adapter(model: nn.Module) -> None:
    if adapts_tied_weight(model):
        logger.warning(
            "An adapter is on the output head or the embedding, which share one weight: merge_and_unload() would "
            "change both, and give another model than was trained. Keep the adapter unmerged, or start from a head "
            "of its own, before get_peft_model: head = model.get_output_embeddings(); head.weight = "
            "torch.nn.Parameter(head.weight.detach().clone()); model.config.tie_word_embeddings = False"
        )


def check_before_training(trainer: Any) -> None:
    """Raises ValueError in one line: rows beyond the model, nothing to train, settings that cannot be carried out.

    Warns of an adapter that cannot be merged.
    """
    warn_of_tied_adapter(trainer.model)
    for name, rows in trainer.filled_datasets().items():
        refuse_beyond(rows, trainer.model, trainer.processing_class, place=f"{name} data")
        if trainer.stage == "preference":
            brings_reference(rows)  # refuses a column with gaps, which the first batch would name less well
    if trainer.train_dataset is not None:
        refuse_nothing_to_train(trainer.model)
        refuse_no_steps(trainer)
        refuse_flex_on_cpu(trainer.model, trainer.args.device)
        refuse_optimizer(trainer)
        refuse_unknown_metric(trainer)
        refuse_no_best_model(trainer.args)
        refuse_unsaveable(trainer)


def refuse_flex_on_cpu(model: nn.Module, device: torch.device) -> None:
    config: Any = getattr(model, "config", None)
    if device.type == "cpu" and getattr(config, "_attn_implementation", None) == "flex_attention":
        raise ValueError("attn_implementation 'flex_attention': torch has no backward of it on a CPU; use sdpa")


def refuse_nothing_to_train(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: no parameter is trained (requires_grad). An adapter that was loaded is frozen: "
            "load it with is_trainable=True, or give its folder by name"
        )


def refuse_no_steps(trainer: Any) -> None:
    """Raises ValueError where a run would end at once, and save the model as it came."""
    args, rows = trainer.args, trainer.train_dataset
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs: expected more than 0 without max_steps, got {args.num_train_epochs}")
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(rows, "__len__") and len(rows) < needed:
        raise ValueError(
            f"dataloader_drop_last leaves out all rows: there are {len(rows)}, and a batch takes {needed} over all "
            "processes. Leave it out, or take a smaller per_device_train_batch_size"
        )


@contextmanager
def packages_named(settings: str) -> Iterator[None]:
    """A package that one of the settings needs and that is missing, as ValueError with the words of transformers."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "install" not in str(error):
            raise
        raise ValueError(f"{settings}: {in_one_line(error, LONGEST)}") from error


def refuse_optimizer(trainer: Any) -> None:
    """Make the optimizer of one number, and its schedule: what is missing or out of range shows there."""
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        return
    args = trainer.args
    number = nn.Parameter(torch.zeros(1, device=args.device))
    optimizer: torch.optim.Optimizer = torch.optim.SGD([number], lr=args.learning_rate)
    try:
        with packages_named("needs a package"):
            cls, options = Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
            if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and not options.keys() & OF_MODEL:
                optimizer = cls([number], **options)
                refuse_optim_args_of_no_use(args, options)
    except (TypeError, ValueError, AttributeError) as error:
        words = in_one_line(error, LONGEST)
        raise ValueError(f"optim {args.optim.value!r}, optim_args {args.optim_args!r}: {words}") from error
    name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    try:
        get_scheduler(name, optimizer, 1, 1_000_000, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        words = in_one_line(error, LONGEST)
        raise ValueError(f"lr_scheduler_type {name.value!r}, lr_scheduler_kwargs {options!r}: {words}") from error


def refuse_optim_args_of_no_use(args: Any, options: dict[str, Any]) -> None:
    """transformers reads the names that it knows of an optimizer and leaves out the others."""
    parts = [part for part in (args.optim_args or "").split(",") if part]
    for part in parts:
        others = copy.copy(args)
        others.optim_args = ",".join(other for other in parts if other != part) or None
        if Trainer.get_optimizer_cls_and_kwargs(others)[1] == options:
            raise ValueError(f"{part.strip()!r} would change nothing")


def refuse_no_best_model(args: Any) -> None:
    if args.load_best_model_at_end and "no" in (args.eval_strategy, args.save_strategy):
        raise ValueError(
            "load_best_model_at_end needs evaluations and checkpoints, got eval_strategy "
            f"{args.eval_strategy.value!r} and save_strategy {args.save_strategy.value!r}: it would save the last"
        )


@contextmanager
def hub_named(args: Any) -> Iterator[None]:
    """What prevents a repository on the hub, in whatever way the hub's client says it, as ValueError."""
    try:
        yield
    except (ValueError, TypeError):
        raise
    except Exception as error:
        if not args.push_to_hub:
            raise
        raise ValueError(f"push_to_hub: {in_one_line(error, LONGEST)}") from error


def refuse_unknown_metric(trainer: Any) -> None:
    """The name of a value of an evaluation, where the best model or the learning rate goes by one."""
    wanted = trainer.args.metric_for_best_model
    if wanted is None or trainer.args.eval_strategy == "no":
        return
    values = [
        f"{name}_{value}"
        for name, rows in trainer.filled_datasets().items()
        if name != "train"
        for value in (*trainer.metric_names(rows), *OF_TRAINER)
    ]
    if wanted not in values and f"eval_{wanted}" not in values:
        near = nearest(f"eval_{wanted.removeprefix('eval_')}", values)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(
            f"metric_for_best_model: expected a value of the evaluation, got {wanted!r}; {hint}They are "
            f"{', '.join(values)}"
        )
