"""Going on from a checkpoint, or one line that says why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from wrpo.reference.fingerprint import start_fingerprint
from wrpo.user_error import UserError

from .run_record import compare, read_record, record_of, write_record


class ResumingTrainer(Trainer):
    """A Trainer that keeps what its run is made of with each checkpoint, and goes on from the same alone."""

    began_with: dict[str, Any] | None = None  # the model before training, however often `train` is called
    run_record: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As the Trainer's; without an argument the setting `resume_from_checkpoint` counts.

        Raises:
            UserError: no such checkpoint, or one whose state is of another kind of run, of another model or optimizer.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = find_checkpoint(self.args, wanted)
        if checkpoint or self.args.save_strategy != "no":
            self.began_with = self.began_with or start_fingerprint(self.model, self.processing_class)
            self.run_record = record_of(self)
        if checkpoint:  # the first process decides for all
            kept, record = broadcast_object_list([read_record(Path(checkpoint)), self.run_record])
            compare(kept, record, checkpoint)
        return super().train(checkpoint, *args, **options)

    def reference_facts(self) -> dict[str, Any]:
        """What `run_record` says of the reference."""
        return {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.run_record and self.args.should_save and output_dir:  # a checkpoint
            write_record(self.run_record, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """torch takes up the state of any optimizer; the first step meets what is missing there, or nothing does."""
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if checkpoint is None or self.is_deepspeed_enabled or not isinstance(optimizer, torch.optim.Optimizer):
            return
        groups = optimizer.param_groups
        if lacking := [name for name in optimizer.defaults if any(name not in group for group in groups)]:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} has the state of another optimizer than optim "
                f"{self.args.optim.value!r}, {type(optimizer).__name__}: no {', '.join(lacking)} in it. Go on with the "
                "optimizer that it was made with, or start a new run from the model in the checkpoint"
            )


def find_checkpoint(config: Any, wanted: str | bool | None) -> str | None:
    """The folder that `resume_from_checkpoint` names; `true` is the newest one in output_dir.

    Raises:
        UserError: there is none.
    """
    wanted = str(wanted)
    if wanted.lower() in ("none", "false"):
        return None
    newest = wanted.lower() == "true"
    folder = config.output_dir if newest else wanted
    found = folder if Path(folder).is_dir() else None
    if newest and found:
        found = get_last_checkpoint(folder)
    if found is None:
        raise UserError(f"resume_from_checkpoint: no checkpoint {'in' if newest else 'at'} {folder}")
    return found


class _FirstStep(TrainerCallback):
    has_begun = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.has_begun = True


def train_from(trainer: Any, checkpoint: str | None) -> None:
    """Train, from `checkpoint` if there is one.

    Raises:
        UserError: a checkpoint that is damaged, or of another model or run: whatever fails before the first step.
    """
    first_step = _FirstStep()
    trainer.add_callback(first_step)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if checkpoint is None or first_step.has_begun:
            raise
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is damaged, or of another model or other settings "
            f"({type(error).__name__}: {error}). Drop it and resume from the one before, or start anew"
        ) from error
