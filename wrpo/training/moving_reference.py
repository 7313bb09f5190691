"""A reference that follows the policy: every few steps the copy's weights move towards the policy's.

    reference <- a policy + (1 - a) reference        every k optimizer steps

Source: TR-DPO, arXiv:2404.09656; names and defaults of the settings as in TRL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback

from wrpo.user_error import UserError

FILE = "moved_reference.safetensors"


class MovingReference(TrainerCallback):
    """Moves the frozen copy; the trainer keeps it in every checkpoint, where a resumed run finds it.

    Args:
        reference: the frozen copy, a model like the policy.
        share: a, in (0, 1]; 1 puts the policy in its place.
        steps: k, optimizer steps from one move to the next.
    """

    def __init__(self, reference: nn.Module, share: float, steps: int):
        self.reference, self.share, self.steps = reference, share, steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if state.global_step % self.steps:
            return
        policy = dict(model.named_parameters())
        for name, parameter in self.reference.named_parameters():
            parameter.lerp_(policy[name].to(parameter), self.share)

    def save(self, checkpoint: str) -> None:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        save_model(self.reference, str(Path(checkpoint) / FILE))

    def load(self, checkpoint: str) -> None:
        """Raises UserError for a checkpoint of a run whose reference stood still."""
        file = Path(checkpoint) / FILE
        if not file.exists():
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} has no {FILE}; it is of a run without sync_ref_model"
            )
        load_model(self.reference, str(file))
