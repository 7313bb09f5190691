"""What SFT and preference optimisation share of their settings, and those of SFT.

Each field says what it means, its unit, its default and where that comes from. Defaults of
`transformers.TrainingArguments` that the paper sets otherwise are set here; `inherited_fields` says what becomes of
every other field of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from wrpo.settings import LAYOUT, LayoutName, check_choices, check_range, knob

from .inherited_fields import check_inherited, settle_inherited


@dataclass
class FusedHeadConfig(TrainingArguments):
    """What both stages share. Raises ValueError naming the field when a value is out of range."""

    num_train_epochs: float = knob(1.0, "Passes over the data. Default: 1 (paper).", group="training")
    per_device_train_batch_size: int = knob(
        2, "Rows of data a device and micro-batch. Default: 2 (paper, WRPO).", group="training"
    )
    gradient_accumulation_steps: int = knob(
        8,
        "Micro-batches an optimizer step; their sum is exactly the mean over all their rows (WRPO) or tokens (SFT), "
        "however uneven they are. Default: 8 (paper, with 8 devices: 128 rows a step).",
        group="training",
    )
    lr_scheduler_type: str = knob("cosine", "Learning-rate schedule. Default: cosine (paper).", group="training")
    warmup_steps: float = knob(
        0.1, "Learning-rate warm-up: steps, or below 1 a share of them. Default: 0.1 (paper).", group="training"
    )
    logging_steps: float = knob(
        10,
        "Optimizer steps between log lines, or below 1 a share of all; a run of fewer than ten times as many logs ten "
        "times all the same. Default: 10.",
        group="logging",
    )
    logging_nan_inf_filter: bool = knob(
        False,
        "Hide NaN losses in the log. Default: False: a NaN should be seen, and looking costs a device sync a step.",
        group="logging",
    )
    bf16: bool | None = knob(
        None,
        "Compute in bfloat16 (autocast). Default: yes on a GPU that supports it, unless fp16 is set (paper: bf16).",
        group="speed",
    )
    dataloader_pin_memory: bool | None = knob(
        None,
        "Batches in pinned memory, for copies to an accelerator. Default: yes where training runs on one.",
        group="speed",
    )
    resume_from_checkpoint: str | None = knob(
        None,
        "Go on from a checkpoint: true for the newest in output_dir, or its folder. Default: none, a new run.",
        group="training",
    )
    remove_unused_columns: bool = knob(
        False, "Default: False, and it must stay so: the collator reads columns that the model does not.", group="data"
    )
    max_length: int | None = knob(
        2048, "Most tokens in prompt + one response; none: no limit. Default: 2048 (paper).", group="data"
    )
    max_prompt_length: int | None = knob(
        1800, "Most tokens in the prompt; none: no limit. Default: 1800 (paper).", group="data"
    )
    layout: LayoutName = knob("auto", f"{LAYOUT} A dropout is drawn once for a shared prompt.", group="speed")
    budget_bytes: int | None = knob(
        None,
        "Bytes that the logits which exist at a time may take. Default: that of the kernels, 512 MiB, on an "
        "accelerator a 32nd of its memory, at most 4 GiB.",
        group="speed",
    )
    kernel_backend: str | None = knob(
        None,
        "Kernel by name; it runs or raises. Default: the best that runs here, see `python -m wrpo_kernels`.",
        group="speed",
    )
    logits_dtype: Literal["float32"] | None = knob(
        None,
        "float32: logits of a 16-bit head are not rounded before their softmax. Log-probs then err by about 1e-4 nats "
        "instead of 1e-2 and more; a logit takes 6 bytes of the budget instead of 2, and a step more time. See "
        "docs/own_loop.md. Default: none, the type of the hidden states.",
        group="speed",
    )
    check_head: bool = knob(
        True,
        "Before training, compare the fused head with the model's own logits on a few tokens; raise if they disagree. "
        "Default: True. Where the weights are not there yet (ZeRO-3), this is done in the first wrapped forward.",
        group="speed",
    )
    draw_curves: bool = knob(
        True, "Draw training_curves.png beside metrics.json at the end. Default: True.", group="logging"
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and is_torch_bf16_gpu_available()
        check_inherited(self)
        super().__post_init__()
        settle_inherited(self)
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = self.device.type != "cpu"
        check_choices(self)
        check_range(self, "max_length", low=2)
        check_range(self, "max_prompt_length", "budget_bytes", low=1)

    def unused_role(self) -> str | None:
        """The role whose responses weigh nothing in any step, so that the data can leave them out; None: no such."""
        return None

    def head_options(self) -> dict:
        """How the kernels are to run: keyword arguments of every `linear_...` op."""
        logits_dtype = None if self.logits_dtype is None else torch.float32
        return {"budget_bytes": self.budget_bytes, "logits_dtype": logits_dtype, "backend": self.kernel_backend}


@dataclass
class SFTConfig(FusedHeadConfig):
    """The stage before WRPO: fine-tuning on each row's best source response."""

    learning_rate: float = knob(7e-6, "Peak learning rate. Default: 7e-6 (paper).", group="training")
    per_device_train_batch_size: int = knob(
        8, "Rows of data a device and micro-batch. Default: 8 (paper, SFT).", group="training"
    )
    gradient_accumulation_steps: int = knob(
        2, "Micro-batches an optimizer step. Default: 2 (paper, SFT).", group="training"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout == "shared":
            raise ValueError("layout 'shared' would change nothing: a row has one response to learn; use packed")
