"""The trainers that `benchmarks.whole_steps` compares: same model, same rows, one optimizer step whenever asked.

    fused          `WRPOTrainer` as it comes, in the layout that it chooses
    padded, packed, shared                          the same in the layout that is named
    packed flex, packed flash, shared flex          the same with another attention
    full logits    the same trainer and loss in padded rows, from the model's own logits as plain torch takes their
                   log-softmax
    TRL            `trl.DPOTrainer` as it comes, on pairs
    TRL with our head                               the same after `wrpo_kernels.integrations.trl.install()`

All use the reference log-probs that the rows bring along, AdamW and the same seed, none recomputes activations.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.suite.memory import MIB, peak_above_now
from benchmarks.suite.training_models import work_of
from wrpo import WRPOConfig, WRPOTrainer
from wrpo.data.batch import row_of
from wrpo.training.response_weights import response_weights
from wrpo.training.start_report import StartReport
from wrpo_kernels import PreferenceOutput, preference_loss
from wrpo_kernels.integrations.trl import install

BETA = 0.01
ALPHA = 0.1  # of the source, in triples


class Step(NamedTuple):
    seconds: float  # from the batch to the changed weights
    tokens: int  # of prompts and answers, the prompt again for each answer; padding is not counted
    loss: float


class FullLogits(WRPOTrainer):
    def forward_loss(self, model: nn.Module, batch: dict, alpha: float, count: Tensor | None) -> PreferenceOutput:
        labels, ref_logp = batch["labels"], self.reference(model, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        counts = labels != -100
        token_logp = logits.float().log_softmax(-1).gather(-1, labels.where(counts, 0)[..., None])[..., 0]
        return preference_loss(
            (token_logp * counts).sum(1),
            ref_logp,
            seq_weight=response_weights(batch, alpha),
            group=row_of(batch),
            num_groups=len(batch["num_responses"]),
            beta=self.args.beta,
            normalizer=count,
        )


OURS = ("fused", "padded", "full logits")
CONTESTANTS = {"triples": OURS, "pairs": (*OURS, "TRL DPOTrainer")}
# Of ours: the layout, and the attention of transformers where it is not the model's own.
VARIANTS: dict[str, tuple[str, str | None]] = {
    "fused": ("auto", None),
    "padded": ("padded", None),
    "packed": ("packed", None),
    "shared": ("shared", None),
    "packed flex": ("packed", "flex_attention"),
    "packed flash": ("packed", "flash_attention_2"),
    "shared flex": ("shared", "flex_attention"),
    "full logits": ("padded", None),
}
NAMES = (*VARIANTS, "TRL DPOTrainer", "TRL with our head")


class Setting(NamedTuple):
    """What all contestants train."""

    model: str
    comparison: str  # a name of `CONTESTANTS`
    batch: int  # rows a step
    steps: int
    lengths: tuple[int, int] | None = None  # tokens of every prompt and of every answer; None: those of the rows
    dtype: str = "float32"  # bfloat16: by autocast, weights in float32


def why_not(contestant: str, comparison: str) -> str | None:
    if contestant.startswith("TRL"):
        if importlib.util.find_spec("trl") is None:
            return "trl is not installed: pip install trl"
        return None if comparison == "pairs" else "it has chosen and rejected only"
    if contestant.endswith("flash") and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install flash-attn"
    if contestant.endswith("flex") and not torch.cuda.is_available():
        return "flex_attention has no backward on a CPU"
    return None


def trainer_of(
    contestant: str, setting: Setting, model: nn.Module, tokenizer: Any, rows: list[dict], folder: str
) -> Trainer:
    """A trainer that has not started.

    Args:
        contestant: one of `NAMES`.
        rows: tokenised triples or pairs with `ref_logp`.
    """
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": setting.steps,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": setting.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": setting.dtype == "bfloat16",
        "seed": 42,
        "beta": BETA,
    }
    if contestant.startswith("TRL"):
        if contestant == "TRL with our head":
            install()
        return dpo_trainer(common, model, tokenizer, rows)
    kind = FullLogits if contestant == "full logits" else WRPOTrainer
    layout, attention = VARIANTS[contestant]
    if attention is not None:
        model.set_attn_implementation(attention)
    ours = {
        "alpha": ALPHA,
        "alpha_schedule": "constant",
        "reference": "precompute",
        "draw_curves": False,
        "layout": layout,
    }
    return kind(model, WRPOConfig(**common, **ours), train_dataset=rows, processing_class=tokenizer)


def dpo_trainer(settings: dict[str, Any], model: nn.Module, tokenizer: Any, rows: list[dict]) -> Trainer:
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        """The rows are token ids and bring the reference along: nothing is left to prepare."""

        def _prepare_dataset(self, dataset: datasets.Dataset, *_args: Any) -> datasets.Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: datasets.Dataset, *_args: Any) -> datasets.Dataset:
            return dataset

    named = [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["response_ids"][0],
            "rejected_ids": row["response_ids"][1],
            "ref_chosen_logps": row["ref_logp"][0],
            "ref_rejected_logps": row["ref_logp"][1],
        }
        for row in rows
    ]
    args = DPOConfig(**settings, precompute_ref_log_probs=True, max_length=None)
    return OfTokens(model, args=args, train_dataset=datasets.Dataset.from_list(named), processing_class=tokenizer)


class OneStepAtATime(TrainerCallback):
    """Waits for a word before each optimizer step, and answers with what it took."""

    def __init__(self, connection: Connection):
        self.connection, self.tokens, self.loss, self.start = connection, 0, 0.0, 0.0

    def watch(self, trainer: Trainer) -> None:
        """Reads tokens and loss where the trainer has them; it rounds what it logs."""
        inner = trainer.training_step

        def training_step(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any) -> Tensor:
            self.tokens = padded_tokens(inputs)
            loss = inner(model, inputs, *args, **options)
            self.loss = float(loss)
            return loss

        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def on_step_begin(self, *_args: Any, **_options: Any) -> None:
        self.connection.recv()
        self.start = time.perf_counter()

    def on_step_end(self, *_args: Any, **_options: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.connection.send(Step(time.perf_counter() - self.start, self.tokens, self.loss))


def padded_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of the batch in padded rows without the padding: a shared prompt counts once for each of its answers."""
    if "branch" not in batch:
        return int(batch["attention_mask"].sum())
    answers: dict[int, int] = defaultdict(int)
    for segment, branch in zip(batch["segment"].flatten().tolist(), batch["branch"].flatten().tolist(), strict=True):
        answers[segment] = max(answers[segment], branch)
    of_prompt = batch["segment"][(batch["branch"] == 0) & (batch["segment"] >= 0)].tolist()
    return int((batch["branch"] > 0).sum()) + sum(answers[segment] for segment in of_prompt)


def serve(connection: Connection, contestant: str, setting: Setting, threads: int) -> None:
    """A process's whole life: says its layout when it is ready, takes its steps, and says its peak in MiB at the end.

    The peak is what training added to the process that held model and data: gradients, the optimizer's states,
    activations and logits.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, quiet():
        rows = setting.batch * setting.steps
        work = work_of(setting.model, rows, pairs=setting.comparison == "pairs", lengths=setting.lengths)
        trainer = trainer_of(contestant, setting, *work, folder)
        for teller in (PrinterCallback, StartReport):
            trainer.remove_callback(teller)
        OneStepAtATime(connection).watch(trainer)
        connection.send(trainer.layout_choice.layout.name if isinstance(trainer, WRPOTrainer) else "padded")
        connection.send(peak_mib(trainer))


def peak_mib(trainer: Trainer) -> float:
    if not torch.cuda.is_available():
        return peak_above_now(trainer.train) / MIB
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.train()
    return (torch.cuda.max_memory_allocated() - before) / MIB


@contextmanager
def quiet() -> Iterator[None]:
    """The trainers' own lines and bars would come between the figures."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
