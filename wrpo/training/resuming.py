"""Going on from a checkpoint, or one line that says why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from wrpo.user_error import UserError


def find_checkpoint(config: Any) -> str | None:
    """The folder that `resume_from_checkpoint` names; `true` is the newest one in output_dir.

    Raises:
        UserError: there is none.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
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
