"""`wrpo train`, `wrpo dpo` and `wrpo sft`: from settings to a model that is trained and saved."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed

from wrpo.data import load_triples, tokenize_triples
from wrpo.pretrained import load_model, load_tokenizer, require_template, warn_of_coarse_weights
from wrpo.settings import DataSettings, ModelSettings, SettingsError, parse_settings
from wrpo.user_error import UserError, in_one_line

from .config import FusedHeadConfig, SFTConfig, WRPOConfig
from .resuming import find_checkpoint, train_from
from .sft_trainer import SFTTrainer
from .wrpo_trainer import WRPOTrainer

OUTPUTS = {"model": "", "metrics": "metrics.json", "curves": "training_curves.png"}  # in output_dir


def train(arguments: list[str]) -> None:
    """Preference optimisation (WRPO and its family) on triples: a source's answer, the target's best and its worst.

        wrpo train examples/wrpo.yaml --train_file triples.jsonl --output_dir runs/wrpo
        wrpo train triples.jsonl --model_name_or_path path/to/model --output_dir runs/wrpo

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    _fit(WRPOTrainer, *parse("train", WRPOConfig, arguments, getdoc(train)), targets=True)


def dpo(arguments: list[str]) -> None:
    """Direct preference optimisation on pairs: rows of prompt, chosen and rejected.

        wrpo dpo pairs.jsonl --model_name_or_path path/to/model --output_dir runs/dpo

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    from .config import DPOConfig  # type: ignore[attr-defined]  # on its way

    _fit(WRPOTrainer, *parse("dpo", DPOConfig, arguments, getdoc(dpo)), targets=True)


def sft(arguments: list[str]) -> None:
    """Fine-tuning on the source answers: the stage before wrpo train.

        wrpo sft examples/sft.yaml --model_name_or_path path/to/target --train_file sft.jsonl --output_dir runs/sft

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    _fit(SFTTrainer, *parse("sft", SFTConfig, arguments, getdoc(sft)), targets=False)


def parse(
    command: str, config_class: type[FusedHeadConfig], arguments: list[str], description: str | None = None
) -> tuple[ModelSettings, DataSettings, Any]:
    """The settings of one of the three commands; a word that is no settings file is the train file."""
    classes = (ModelSettings, DataSettings, config_class)
    return parse_settings(classes, arguments, f"wrpo {command}", description, words=("train_file",))


def _fit(trainer_class: Any, model: ModelSettings, data: DataSettings, config: Any, *, targets: bool) -> None:
    """Train, save, and say where everything is. Data first: its errors are the cheapest to meet."""
    set_seed(config.seed)
    checkpoint = find_checkpoint(config)
    tokenizer = load_tokenizer(model)
    require_template(tokenizer, model)
    with config.main_process_first(desc="tokenising"):  # the others read what the first has put on disk
        rows = _rows(_train_source(data), data.train_split, tokenizer, config, data, targets)
        eval_rows = data.eval_file and _rows(data.eval_file, data.eval_split, tokenizer, config, data, targets)
    if eval_rows and config.eval_strategy == "no":
        config.eval_strategy = type(config.eval_strategy)("epoch")
    try:
        policy = load_model(model)
        warn_of_coarse_weights(policy)
        trainer = trainer_class(
            policy,
            config,
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            processing_class=tokenizer,
        )
    except (ValueError, TypeError) as error:  # settings, model and data that do not go together
        raise UserError(str(error)) from error
    train_from(trainer, checkpoint)
    trainer.save_model()
    if config.process_index == 0:
        _print_paths(Path(config.output_dir))


def _train_source(data: DataSettings) -> Any:
    """What `load_triples` takes: the name of a file, or a data set.

    Raises:
        SettingsError: no such data set, configuration or split.
    """
    if data.dataset_name is None:
        return data.train_file
    try:
        return datasets.load_dataset(data.dataset_name, data.dataset_config, split=data.dataset_split)
    except (OSError, ValueError) as error:
        raise SettingsError(f"dataset_name {data.dataset_name!r}: cannot be loaded: {in_one_line(error)}") from error


def _rows(source: Any, split: str, tokenizer: Any, config: Any, data: DataSettings, targets: bool) -> Any:
    form = {"from_scores": True} if data.from_scores else {}
    return tokenize_triples(
        load_triples(source, split=split, skip_bad_rows=data.skip_bad_rows, targets=targets, **form),
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        skip_bad_rows=data.skip_bad_rows,
        chat_template_kwargs=data.template_options(),
        num_proc=data.tokenize_processes if data.tokenize_processes > 1 else None,
    )


def _print_paths(folder: Path) -> None:
    for what, name in OUTPUTS.items():
        if (folder / name).exists():
            print(f"{what:<8} {folder / name}")
