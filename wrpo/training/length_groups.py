"""Rows of like length in a batch, for `train_sampling_strategy`: lengths as the samplers of transformers read them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from wrpo.data.lengths import longest_sequences, tokens_with_prompt_once

BY_LENGTH = ("group_by_length", "batch_rebalance")


class RowLengths(torch.utils.data.Dataset):
    """In the place of rows: items with as many input ids as a row of the batch has of its prompt and responses.

    is_shared: the prompt and all its responses; else the prompt and its longest. Default: False.
    """

    def __init__(self, rows: Any, name: str = "input_ids", *, is_shared: bool = False):
        self.lengths, self.name = (tokens_with_prompt_once if is_shared else longest_sequences)(rows), name

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {self.name: range(self.lengths[index])}


class LengthGroupingTrainer(Trainer):
    """A Trainer that knows how long tokenised rows are in its layout. A stream keeps its own order."""

    layout_choice: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(self._lengths_of(rows))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super()._get_eval_sampler(self._lengths_of(eval_dataset))

    def _lengths_of(self, rows: Any) -> Any:
        if self.args.train_sampling_strategy not in BY_LENGTH or not hasattr(rows, "__len__"):
            return rows
        names = getattr(self.processing_class, "model_input_names", None) or ["input_ids"]
        return RowLengths(rows, names[0], is_shared=self.layout_choice.layout.name == "shared")
