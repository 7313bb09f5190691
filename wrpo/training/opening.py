"""What a trainer is given, as it needs it: a model by name or as it is, data as a file, raw rows or token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from torch import nn

from wrpo.data import DataError, load_examples, tokenize_examples
from wrpo.data.selection import leave_out
from wrpo.data.tokenised_row import COLUMNS
from wrpo.pretrained import load_model, load_tokenizer
from wrpo.rows.errors import shown
from wrpo.settings import ModelSettings

from .config import FusedHeadConfig

TOKENS = ("prompt_ids", "response_ids")  # what tells a tokenised row


def open_tokenizer(processing_class: Any, model: Any) -> Any:
    """What the caller gave, itself or by its name; else the tokenizer that lies with a model given by name, else None.

    Raises:
        TypeError: a model that is neither a name nor a model.  SettingsError: nothing to load under that name.
    """
    if not isinstance(model, (str, Path, nn.Module, type(None))):
        raise TypeError(f"model must be a folder, a hub name or a model of transformers, got {shown(model)}")
    if processing_class is None and isinstance(model, (str, Path)):
        return load_tokenizer(ModelSettings(model_name_or_path=str(model)), "model")
    if isinstance(processing_class, (str, Path)):
        return load_tokenizer(ModelSettings(model_name_or_path=str(processing_class)), "processing_class")
    return processing_class


def open_model(model: Any, peft_config: Any) -> nn.Module | None:
    """The model with its adapter.

    Args:
        model: a folder or hub name, of an adapter too, which is then trained on; a causal language model of
            transformers, or None where `model_init` makes it.
        peft_config: a `peft.PeftConfig` whose adapter the model gets; None leaves it as it is.

    Raises:
        SettingsError: nothing to load under that name.  TypeError: an adapter of another kind.
        ValueError: a peft_config, and a model that has an adapter.
    """
    if isinstance(model, (str, Path)):
        model = load_model(ModelSettings(model_name_or_path=str(model)), "model", is_trained=True)
    if peft_config is None:
        return model
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a peft.PeftConfig, for example LoraConfig(r=16), got {shown(peft_config)}"
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "peft_config would put a second adapter on the model and take the first one off. Leave it out to go on "
            "with the one that is there, or give model.merge_and_unload()"
        )
    return get_peft_model(model, peft_config)


def open_train_data(data: Any, tokenizer: Any, args: FusedHeadConfig, stage: str) -> Any:
    """`open_data` of one data set that is not empty; None, for a trainer that only evaluates, stays None."""
    if isinstance(data, dict):
        raise TypeError(f"train_dataset must be one data set, got several: give one of {', '.join(map(repr, data))}")
    opened = open_data(data, tokenizer, args, stage)
    if opened is not None and hasattr(opened, "__len__") and not len(opened):
        raise ValueError(f"train_dataset: expected at least one row, got {shown(data)}")
    if opened is not None and not hasattr(opened, "__len__") and args.max_steps <= 0:
        raise ValueError("max_steps: expected the number of steps, since train_dataset is a stream and has no length")
    return opened


def open_eval_data(data: Any, tokenizer: Any, args: FusedHeadConfig, stage: str) -> Any:
    """`open_data` of one data set, or of each of a dict of several."""
    if isinstance(data, dict):
        return {name: open_data(part, tokenizer, args, stage) for name, part in data.items()}
    return open_data(data, tokenizer, args, stage)


def open_data(data: Any, tokenizer: Any, args: FusedHeadConfig, stage: str) -> Any:
    """Tokenised rows, without the responses that the run would only multiply by zero.

    Rows that are tokenised stay as they are; a path, a list or a `datasets.Dataset` of raw rows is read and tokenised.

    Args:
        data: one of these, or None.
        tokenizer: for raw rows.
        args: `max_length`, `max_prompt_length` and `unused_role()`.
        stage: "preference" or "sft".

    Raises:
        DataError: a row that cannot be used.  ValueError: raw rows without a tokenizer, or as a stream.
        TypeError: something else.
    """
    if data is None or (hasattr(data, "__len__") and not len(data)):
        return data
    if not isinstance(data, (str, Path, Iterable)) and not hasattr(data, "__getitem__"):
        raise TypeError(f"a data set must be a file, rows or a data set, got {shown(data)}")
    if isinstance(data, datasets.Dataset):
        data = data.with_format(None)  # rows of lists, not of tensors
    if not isinstance(data, (str, Path)) and is_tokenised(data):
        return leave_out(data, args.unused_role())
    if not hasattr(data, "__len__") and not isinstance(data, Path):
        raise ValueError(
            "a stream of raw rows cannot be tokenised ahead; give a file or a data set with a length, or a stream of "
            "the rows of wrpo.data.tokenize_examples"
        )
    if tokenizer is None:
        raise ValueError("raw rows need a tokenizer: give processing_class, or the model by its name")
    with args.main_process_first(desc="tokenising"):  # the others read what the first has put on disk
        rows = tokenize_examples(
            load_examples(data, stage=stage),
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
        )
    return leave_out(rows, args.unused_role())


def is_tokenised(data: Any) -> bool:
    """By the first row, or of a stream that names its columns by these.

    Raises:
        DataError: token ids of another form than `tokenize_examples` makes.
    """
    row = getattr(data, "column_names", None) or first_row(data)
    if not isinstance(row, (dict, list)):
        raise DataError("rows that are dicts", shown(row), "Give a list of dicts, a data set or the name of a file.")
    found = [name for name in row if name in COLUMNS]
    if not set(found).isdisjoint(TOKENS) and len(found) < len(COLUMNS):
        expected = "prompt_ids, response_ids, role and share, as wrpo.data.tokenize_examples makes them"
        raise DataError(expected, f"the columns {', '.join(map(str, row))}", "Tokenise the rows with it.")
    return not set(found).isdisjoint(TOKENS)


def first_row(data: Any) -> Any:
    """Of a list or a data set by its place; a stream, which may have a `__getitem__` of another meaning, is begun.

    Raises:
        DataError: a stream that can be gone through only once.
    """
    if hasattr(data, "__len__"):
        return data[0]
    rows = iter(data)
    if rows is data:
        raise DataError("rows that can be gone through more than once", shown(data), "Give a list of them.")
    return next(rows)
