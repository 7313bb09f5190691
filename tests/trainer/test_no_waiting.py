"""A training step reads nothing back from an accelerator: it runs on tensors that have no values.

Those of the meta device stand for those of a GPU; reading one raises (`benchmarks.suite.recording`).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_rows
from tiny_runs import SETTINGS, wrpo_trainer

from benchmarks.suite.recording import recorded
from wrpo import SFTConfig, SFTTrainer
from wrpo.data.batch import on_device
from wrpo.head import fused_head
from wrpo.training.head_trainer import HeadTrainer

META = torch.device("meta")


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the meta device has not."""
    monkeypatch.setattr(fused_head, "_decided_dtype", nullcontext)


def trainer_of(stage: str, folder: Path, **settings) -> HeadTrainer:
    if stage == "wrpo":
        return wrpo_trainer(folder, **settings)
    args = SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    return SFTTrainer(tiny_model(), args, train_dataset=tiny_rows())


def step(trainer: HeadTrainer, rows: list[dict]) -> None:
    """What `Trainer.training_step` runs, forward and backward, with everything on the meta device."""
    batch = on_device(trainer.data_collator(rows), META)
    for model in (trainer.model, getattr(getattr(trainer, "reference", None), "model", trainer.model)):
        model.to(META)
        model.config._attn_implementation = "eager"  # for sdpa transformers itself reads the mask, to do without one
    with recorded():
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.empty((), device=META)).backward()


@pytest.mark.parametrize("budget", [None, 4000], ids=["all rows fit", "few rows fit"])
@pytest.mark.parametrize(
    ("stage", "layout"),
    [("wrpo", "padded"), ("wrpo", "packed"), ("wrpo", "shared"), ("sft", "padded"), ("sft", "packed")],
)
def test_a_training_step_waits_for_nothing(stage, budget, layout, tmp_path):
    settings = {"layout": layout, "budget_bytes": budget}
    step(trainer_of(stage, tmp_path, **settings), tiny_rows()[:3])


def test_a_batch_that_tells_no_lengths_is_waited_for(tmp_path):
    """So the test above does see what waits."""
    trainer = trainer_of("wrpo", tmp_path, layout="padded")
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: {name: x for name, x in collator(rows).items() if name != "lengths"}
    with pytest.raises(RuntimeError, match="meta"):
        step(trainer, tiny_rows()[:3])
