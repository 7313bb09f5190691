"""Which rows a model is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .fields import check_range, knob, refuse_idle


@dataclass
class DataSettings:
    """Which rows a model is trained on.

    Raises:
        ValueError: no data, or data from two places; a value out of range; template options that are no mapping.
    """

    train_file: str | None = knob(
        None,
        "Rows of prompts and answers: .jsonl, .json, .parquet, a glob of them, or a folder of save_to_disk. On the "
        "command line the flag can be left out.",
        group="data",
    )
    dataset_name: str | None = knob(
        None, "Instead of train_file: a data set of the hub, or a folder in its layout.", group="data"
    )
    dataset_config: str | None = knob(None, "Configuration of dataset_name, where it has several.", group="data")
    dataset_split: str = knob(
        "train",
        "Split of dataset_name; part of one as in 'train[:1000]'.",
        group="data",
        aliases=["--dataset_train_split"],
    )
    dataset_test_split: str | None = knob(
        None, "Split of dataset_name to evaluate on, instead of eval_file. Default: none.", group="data"
    )
    eval_file: str | None = knob(
        None, "Rows to evaluate on, every epoch unless eval_strategy says otherwise.", group="data"
    )
    train_split: str = knob("train", "Split of train_file, where it is a saved DatasetDict.", group="data")
    eval_split: str = knob("test", "Split of eval_file, where it is a saved DatasetDict.", group="data")
    from_scores: bool = knob(
        False,
        "Of rows that hold all answers with their scores, use all, weighted, instead of the best and the worst.",
        group="data",
    )
    skip_bad_rows: bool = knob(
        False, "Leave bad rows out and count them, instead of stopping at the first.", group="data"
    )
    chat_template_kwargs: str | None = knob(
        None,
        "Options of the chat template as a mapping (on the command line JSON: '{\"enable_thinking\": false}').",
        group="data",
    )
    tokenize_processes: int = knob(1, "Processes that tokenise; one is enough for fast tokenizers.", group="speed")

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            got = "neither" if self.train_file is None else f"{self.train_file!r} and {self.dataset_name!r}"
            raise ValueError(f"train_file, dataset_name: expected one of the two, got {got}")
        if self.dataset_config is not None and self.dataset_name is None:
            raise ValueError("dataset_config needs dataset_name, the data set that it is a configuration of")
        if self.dataset_test_split is not None and self.eval_file is not None:
            got = f"{self.dataset_test_split!r} and {self.eval_file!r}"
            raise ValueError(f"dataset_test_split, eval_file: expected one of the two, got {got}")
        if self.dataset_test_split is not None and self.dataset_name is None:
            raise ValueError("dataset_test_split needs dataset_name, the data set that it is a split of")
        refuse_idle(self, self.dataset_name is not None, "dataset_name", "dataset_split")
        refuse_idle(self, self.train_file is not None, "train_file", "train_split")
        refuse_idle(self, self.eval_file is not None, "eval_file", "eval_split")
        check_range(self, "tokenize_processes", low=1)
        self.template_options()

    def template_options(self) -> dict | None:
        """`chat_template_kwargs` as keyword arguments.

        Raises:
            ValueError: text that is no JSON object.
        """
        if self.chat_template_kwargs is None:
            return None
        try:
            options = json.loads(self.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"chat_template_kwargs: expected a mapping, got text that is not JSON: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"chat_template_kwargs: expected a mapping, got {self.chat_template_kwargs!r}")
        return options
