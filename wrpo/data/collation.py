"""Batches of tensors from tokenised rows.

    labels[s, t] = input_ids[s, t + 1]   where position t + 1 belongs to the response, else -100

so `labels` is already shifted: entry t is predicted from the hidden state of entry t. B rows, S sequences (the
responses of all rows, row after row), T positions. Packed and shared rows are told in `wrpo.data.layout`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wrpo.rows.errors import DataError, shown
from wrpo.rows.softmax import softmax
from wrpo.settings import check_choices, check_range

from .layout import PADDED, Example, Layout, counted, place_tokens
from .model_limits import vocabulary_size
from .roles import Role, best_response, model_names
from .tokenised_row import check_row, reference_logp, refuse_empty, source_logp

IGNORE = -100
Batch = dict[str, Any]  # tensors, and `lengths`, which stay on the host


@dataclass
class PreferenceCollator:
    """Rows of `tokenize_examples` to one batch: the responses of the first row, then those of the second, ...

    Args:
        pad_token_id: written into `input_ids` beyond a sequence's end, where `attention_mask` is 0.
        pad_to_multiple_of: round T up to a multiple of this (tensor cores like 8). Default: None, the longest sequence.
        empty_response: a response without a token to count (empty, or one token that nothing precedes). raise: an
            error; zero: let through, for the loss to leave out. Default: raise.
        reward_temperature: the shares of a row's sources are softmax(reward / this) over them, in units of the reward.
            Default: None, the row's own shares.
        source_models: names of the models whose number goes into `source_id`. Default: None, no source_id.
        with_source_logp: hand `source_logp` on. Default: False.
        layout: `wrpo.data.layout.Layout`, where the tokens stand. Default: padded rows.

    Returns a dict with
        lengths: list of B lists, on the host: the tokens of each response of a row that count;
        input_ids [S, T] int64, attention_mask [S, T] int64, labels [S, T] int64; in packed and shared rows what
            `wrpo.data.layout.place_tokens` returns;
        num_responses [B] int64, how many of the S sequences each row has;
        role [S] int64: 0 source, 1 target, 2 rejected (`wrpo.data.roles`);
        share [S] float32, of the response among those of its role in its row;
        source_id [S] int64, if source_models: the place of the answer's model there (`model_names`), their number for
            any other model, -1 where the response is no source's;
        ref_logp [S] float32, if the rows have it; or ref_place [S] int64, its place in the trainer's table;
        source_logp [S, M] float32, if with_source_logp: each response under M models, nats a token of theirs.

    Raises:
        ValueError: an argument out of range, when it is made.
        DataError: a row that is no prompt with its responses, see `wrpo.data.tokenised_row`; a response without a token
            to count, not one `ref_logp` for each response, or a column that was asked for and is missing. The row is
            named by its place in the batch.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    empty_response: Literal["raise", "zero"] = "raise"
    reward_temperature: float | None = None
    source_models: Sequence[str] | None = None
    with_source_logp: bool = False
    layout: Layout = PADDED

    def examples(self, rows: list[dict]) -> list[Example]:
        """The prompt and the responses of each row that go into a batch."""
        return [(row["prompt_ids"], row["response_ids"]) for row in rows]

    def __post_init__(self) -> None:
        check_choices(self)
        self.layout = checked_layout(self.layout)
        check_range(self, "pad_token_id", low=0)
        check_range(self, "pad_to_multiple_of", low=1)
        check_range(self, "reward_temperature", low=0, open_low=True)

    def __call__(self, rows: list[dict]) -> Batch:
        for number, row in enumerate(rows, 1):
            check_row(row, number)
            if self.empty_response == "raise":  # here, because on a GPU the loss cannot look without waiting for it
                refuse_empty(row, number)
        batch = laid_out(self.examples(rows), self.pad_token_id, self.layout, self.pad_to_multiple_of)
        batch["num_responses"] = torch.tensor([len(row["response_ids"]) for row in rows])  # [B]
        batch["role"] = torch.tensor([Role[role.upper()] for row in rows for role in row["role"]])  # [S]
        shares = [share for number, row in enumerate(rows, 1) for share in self._shares(row, number)]
        batch["share"] = torch.tensor(shares, dtype=torch.float32)  # [S]
        if self.source_models is not None:
            number_of: dict[str | None, int] = {name: number for number, name in enumerate(self.source_models)}
            names = [name for row in rows for name in model_names(row)]
            other = len(number_of)
            batch["source_id"] = torch.tensor([-1 if name is None else number_of.get(name, other) for name in names])
        if any(row.get("ref_logp") is not None for row in rows):
            logp = [value for number, row in enumerate(rows, 1) for value in reference_logp(row, number)]
            batch["ref_logp"] = torch.tensor(logp, dtype=torch.float32)  # [S]
        elif any("ref_place" in row for row in rows):
            batch["ref_place"] = torch.tensor([place for row in rows for place in row["ref_place"]])  # [S]
        if self.with_source_logp:
            models = len((rows[0].get("source_logp") or [[]])[0])
            by_model = [values for number, row in enumerate(rows, 1) for values in source_logp(row, number, models)]
            batch["source_logp"] = torch.tensor(by_model, dtype=torch.float32)  # [S, M]
        return batch

    def _shares(self, row: dict, number: int) -> list[float]:
        sources = [place for place, role in enumerate(row["role"]) if role == "source"]
        if self.reward_temperature is None or not sources:
            return row["share"]
        rewards = row.get("reward") or [None] * len(row["role"])
        if None in (of_sources := [rewards[place] for place in sources]):
            raise DataError(
                f"{len(sources)} rewards, one for each source",
                shown(of_sources),
                "Add the column to the rows, or weigh the sources by their own shares.",
                field="reward", file="batch", row=number,
            )  # fmt: skip
        share_of = dict(zip(sources, softmax(of_sources, self.reward_temperature), strict=True))
        return [share_of.get(place, share) for place, share in enumerate(row["share"])]


@dataclass
class SFTCollator:
    """Rows of `tokenize_examples` to one batch of each row's best answer, see `wrpo.data.roles.best_response`.

    Args and what is returned as `PreferenceCollator`: lengths, input_ids, attention_mask, labels, with S = B.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    layout: Layout = PADDED

    def examples(self, rows: list[dict]) -> list[Example]:
        """The prompt and the one response of each row that go into a batch."""
        best = [row["response_ids"][best_response(row["role"], row["share"])] for row in rows]
        return [(row["prompt_ids"], [response]) for row, response in zip(rows, best, strict=True)]

    def __post_init__(self) -> None:
        self.layout = checked_layout(self.layout)
        check_range(self, "pad_token_id", low=0)
        check_range(self, "pad_to_multiple_of", low=1)

    def __call__(self, rows: list[dict]) -> Batch:
        return laid_out(self.examples(rows), self.pad_token_id, self.layout, self.pad_to_multiple_of)


def checked_layout(layout: Any) -> Layout:
    """The layout; a name alone is one for sdpa and eager attention."""
    if isinstance(layout, str):
        return Layout(layout)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a wrpo.data.Layout, or padded, packed or shared, got {layout!r}")
    return layout


def with_layout(collator: Any, layout: Layout) -> Any:
    """A collator like it, of its own class, whose batches have the layout."""
    other = copy.copy(collator)
    other.layout = layout
    return other


def laid_out(examples: list[Example], pad_token_id: int, layout: Layout, multiple: int | None = None) -> Batch:
    """Tokens, labels and lengths of a batch."""
    lengths = [[len(counted(prompt, response)) for response in responses] for prompt, responses in examples]
    if layout.name != "padded":
        return {"lengths": lengths, **place_tokens(examples, pad_token_id, layout, multiple)}
    pairs = [(prompt, response) for prompt, responses in examples for response in responses]
    return {"lengths": lengths, **pad_sequences(pairs, pad_token_id, multiple)}


def pad_sequences(
    pairs: list[tuple[list[int], list[int]]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """S pairs (prompt ids, response ids) as input_ids, attention_mask, labels: [S, T] int64, padded on the right."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    multiple = pad_to_multiple_of or 1
    shape = (len(pairs), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for s, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[s, :end] = torch.tensor([*prompt, *response])
        attention_mask[s, :end] = 1
        labels[s, max(len(prompt) - 1, 0) : end - 1] = torch.tensor(counted(prompt, response))
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_token(tokenizer: Any, model: Any) -> int:
    """A token id for padding, which no label or attention ever sees; one that the model has a row for."""
    size = 1 << 62 if model is None else vocabulary_size(model)
    for owner in (tokenizer, getattr(model, "config", None)):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int) and 0 <= value < size:
            return value
    return 0
