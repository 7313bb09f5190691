"""The arms: what is compared, and the training of each with the library's own trainers.

target            the weak generalist
sft-K             SFT on the best answers of K sources, on a third of the prompts; every arm below starts from it
sft-all-K         more SFT, on the best source answers to the prompts that the preference arms use
dpo-K             DPO on the best and worst answer of the fine-tuned target itself
dpo-source-K      DPO with the best source answer as chosen
wrpo-A-K          WRPO, alpha rising from 0 to A; wrpo-static-A-K: alpha = A throughout
wrpo-each-A-K     WRPO with the best answer of each of the K sources, weights softmax(reward / 0.2)
ipo, simpo        DPO's and WRPO's place taken by these losses
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, ProgressCallback, set_seed

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer
from wrpo.data import load_examples, tokenize_examples

ALPHAS = (0.1, 0.5, 0.9)
SFT = {"learning_rate": 1e-3, "num_train_epochs": 2.0, "per_device_train_batch_size": 32}
PREFERENCE = {"num_train_epochs": 1.0, "per_device_train_batch_size": 16}
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.1, "learning_rate": 3e-5},
    "ipo": {"beta": 0.1, "learning_rate": 3e-5},
    "simpo": {"beta": 2.0, "learning_rate": 3e-5},
}
WEIGHT_TEMPERATURE = 0.2
WRPO_ALPHA = 0.5  # the end of alpha in the arm that stands for WRPO, fixed before any result


class Arm(NamedTuple):
    """sources: how many, in the seed's order; stage: target, sft, sft-all or preference; settings of `WRPOConfig`."""

    name: str
    stage: str
    sources: int
    settings: Mapping[str, Any] = MappingProxyType({})
    keeps_each: bool = False
    is_main: bool = True


def preference(
    name: str, sources: int, alpha: float, *, rises: bool = True, loss: str = "sigmoid", **facts: Any
) -> Arm:
    schedule = {"alpha": alpha, "alpha_schedule": "linear" if rises else "constant"}
    reference = "none" if loss == "simpo" else "copy"
    settings = {"loss_type": loss, "reference": reference} | LOSSES[loss] | schedule
    return Arm(name, "preference", sources, settings, **facts)


def all_arms(num_sources: int) -> list[Arm]:
    """Every arm of a seed, the main ones first."""
    k = num_sources
    main = [
        Arm("target", "target", 0),
        Arm(f"sft-{k}", "sft", k),
        Arm(f"sft-all-{k}", "sft-all", k),
        preference(f"dpo-{k}", k, 0.0),
        preference(f"dpo-source-{k}", k, 1.0, rises=False),
        *[
            preference(f"wrpo-{'' if rises else 'static-'}{alpha}-{k}", k, alpha, rises=rises)
            for alpha in sorted(ALPHAS, key=lambda alpha: alpha != WRPO_ALPHA)
            for rises in (True, False)
        ],
    ]
    counts = [count for count in (1, 2) if count < k]
    fewer = [arm for count in counts for arm in _arms_of_a_source_count(count)]
    other = [
        preference(f"wrpo-each-0.5-{k}", k, 0.5, keeps_each=True, is_main=False),
        *[
            preference(f"{name}-{k}", k, alpha, loss=loss, is_main=False)
            for loss in ("ipo", "simpo")
            for name, alpha in ((loss, 0.0), (f"wrpo-{loss}-0.5", 0.5))
        ],
    ]
    return [*main, *fewer, *other]


def _arms_of_a_source_count(count: int) -> list[Arm]:
    return [
        Arm(f"sft-{count}", "sft", count, is_main=False),
        preference(f"dpo-{count}", count, 0.0, is_main=False),
        preference(f"wrpo-0.5-{count}", count, 0.5, is_main=False),
    ]


# -- training ---------------------------------------------------------------------------------------------------------


def train_sft(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[dict], seed: int, settings: Mapping[str, Any] = SFT
) -> list[dict]:
    """Fine-tunes the model on the rows' source answers, in place; returns the log."""
    return _train(SFTTrainer, SFTConfig, model, tokenizer, rows, seed, dict(settings))


def train_preference(
    model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[dict], seed: int, settings: Mapping[str, Any]
) -> list[dict]:
    """Trains the model on triples, in place; returns the log."""
    return _train(WRPOTrainer, WRPOConfig, model, tokenizer, rows, seed, PREFERENCE | dict(settings))


def _train(
    trainer_class: Any,
    config_class: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict],
    seed: int,
    settings: dict[str, Any],
) -> list[dict]:
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            gradient_accumulation_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            draw_curves=False,
            use_cpu=True,
            seed=seed,
            **settings,
        )
        data = tokens(rows, tokenizer, trainer_class.stage)
        trainer = trainer_class(model.train(), args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar)
        trainer.train()
    model.eval()
    return trainer.state.log_history


class Bar(ProgressCallback):
    """The Trainer's progress bar without its lines of numbers: the log is kept with the result."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        pass


def tokens(rows: list[dict], tokenizer: PreTrainedTokenizerFast, stage: str) -> Dataset:
    return tokenize_examples(load_examples(rows, stage=stage), tokenizer, max_length=None, max_prompt_length=None)


def copied(model: Any) -> Any:
    """The same model apart: arms start from equal weights."""
    with torch.no_grad():
        other = type(model)(model.config)
        other.load_state_dict(model.state_dict())
    return other.eval()
