"""What would fail hours into a run, or at its end, is refused before its first pass over the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from wrpo.data.model_limits import refuse_beyond
from wrpo.spelling import nearest
from wrpo.user_error import in_one_line

from .saving import refuse_unsaveable

OF_TRAINER = ("runtime", "samples_per_second", "steps_per_second")  # what it adds to the values of an evaluation
OF_MODEL = {"params", "model", "optimizer_dict"}  # options of optimizers that transformers makes of the whole model
LONGEST = 400  # characters of another program's words


def check_before_training(trainer: Any) -> None:
    """Raises ValueError in one line: rows beyond the model, nothing to train, settings that cannot be carried out."""
    for name, rows in trainer.filled_datasets().items():
        refuse_beyond(rows, trainer.model, trainer.processing_class, place=f"{name} data")
    if trainer.train_dataset is not None:
        refuse_nothing_to_train(trainer.model)
        refuse_optimizer(trainer)
        refuse_unknown_metric(trainer)
        refuse_unsaveable(trainer)


def refuse_nothing_to_train(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: no parameter is trained (requires_grad). An adapter that was loaded is frozen: "
            "load it with is_trainable=True, or give its folder by name"
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
