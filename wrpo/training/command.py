"""`wrpo train`, `wrpo dpo` and `wrpo sft`: from settings to a model that is trained and saved."""

from __future__ import annotations

from inspect import getdoc
from pathlib import Path
from typing import Any

from transformers import set_seed

from wrpo.data import load_examples, tokenize_examples
from wrpo.data.loading import load_hub
from wrpo.pretrained import check_adapter, load_model, load_tokenizer, require_template, warn_of_coarse_weights
from wrpo.reference.brought import warn_of_other_rounding
from wrpo.settings import DataSettings, ModelSettings, parse_settings
from wrpo.user_error import UserError

from .config import FusedHeadConfig, SFTConfig
from .inherited_fields import describe
from .resuming import find_checkpoint, train_from
from .sft_trainer import SFTTrainer
from .wrpo_config import DPOConfig, WRPOConfig
from .wrpo_trainer import WRPOTrainer

OUTPUTS = {"model": "", "metrics": "metrics.json", "curves": "training_curves.png"}  # in output_dir


def train(arguments: list[str]) -> None:
    """Preference optimisation (WRPO and its family) on rows of a prompt and its responses: triples, pairs, any number.

        wrpo train examples/wrpo.yaml --train_file triples.jsonl --output_dir runs/wrpo
        wrpo train triples.jsonl --model_name_or_path path/to/model --output_dir runs/wrpo

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    _fit(WRPOTrainer, *parse("train", WRPOConfig, arguments, getdoc(train)))


def dpo(arguments: list[str]) -> None:
    """Direct preference optimisation on pairs: rows of prompt, chosen and rejected.

        wrpo dpo pairs.jsonl --model_name_or_path path/to/model --output_dir runs/dpo

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    _fit(WRPOTrainer, *parse("dpo", DPOConfig, arguments, getdoc(dpo)))


def sft(arguments: list[str]) -> None:
    """Fine-tuning on the source answers: the stage before wrpo train.

        wrpo sft examples/sft.yaml --model_name_or_path path/to/target --train_file sft.jsonl --output_dir runs/sft

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    _fit(SFTTrainer, *parse("sft", SFTConfig, arguments, getdoc(sft)))


def parse(
    command: str, config_class: type[FusedHeadConfig], arguments: list[str], description: str | None = None
) -> tuple[ModelSettings, DataSettings, Any]:
    """The settings of one of the three commands; a word that is no settings file is the train file."""
    classes = (ModelSettings, DataSettings, config_class)
    epilog = describe()
    return parse_settings(classes, arguments, f"wrpo {command}", description, words=("train_file",), epilog=epilog)


def _fit(trainer_class: Any, model: ModelSettings, data: DataSettings, config: Any) -> None:
    """Train, save, and say where everything is. Data first: its errors are the cheapest to meet."""
    set_seed(config.seed)
    checkpoint = find_checkpoint(config, config.resume_from_checkpoint)
    if check_adapter(model) and getattr(config, "reference", None) == "adapter":
        raise UserError(
            "reference: adapter is the model without its adapter, which is not the model that training starts from: "
            f"{model.model_name_or_path} is an adapter. Leave it out, or take precompute or copy"
        )
    tokenizer = load_tokenizer(model)
    require_template(tokenizer, f"model_name_or_path {model.model_name_or_path!r}", may_be_none=True)
    sources = _sources(data)
    with config.main_process_first(desc="tokenising"):  # the others read what the first has put on disk
        rows = {
            name: _tokenised(source, split, tokenizer, config, data, trainer_class.stage)
            for name, (source, split) in sources.items()
        }
    if "eval_dataset" in rows and config.eval_strategy == "no":
        config.eval_strategy = type(config.eval_strategy)("epoch")
    try:
        policy = load_model(model, is_trained=True)
        warn_of_coarse_weights(policy)
        warn_of_other_rounding({name: source for name, (source, _) in sources.items()}, rows, policy, config)
        trainer = trainer_class(policy, config, processing_class=tokenizer, **rows)
    except (ValueError, TypeError) as error:  # settings, model and data that do not go together
        raise UserError(str(error)) from error
    train_from(trainer, checkpoint)
    trainer.save_model()
    if config.process_index == 0:
        _print_paths(Path(config.output_dir))


def _sources(data: DataSettings) -> dict[str, tuple[Any, str]]:
    """(a file, or the rows of a hub; the split of a file that has several) to train on and, if asked for, to evaluate
    on, by the trainer's names.
    """
    name, config, test_split = data.dataset_name, data.dataset_config, data.dataset_test_split
    train = data.train_file if name is None else load_hub(name, config, data.dataset_split)
    sources = {"train_dataset": (train, data.train_split)}
    if name is not None and test_split is not None:
        sources["eval_dataset"] = (load_hub(name, config, test_split), test_split)
    elif data.eval_file is not None:
        sources["eval_dataset"] = (data.eval_file, data.eval_split)
    return sources


def _tokenised(source: Any, split: str, tokenizer: Any, config: Any, data: DataSettings, stage: str) -> Any:
    return tokenize_examples(
        load_examples(source, split=split, skip_bad_rows=data.skip_bad_rows, stage=stage, from_scores=data.from_scores),
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
