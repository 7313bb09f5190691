"""Batches of tensors from tokenised rows.

    labels[s, t] = input_ids[s, t + 1]   where position t + 1 belongs to the response, else -100

so `labels` is already shifted: entry t is predicted from the hidden state of entry t. S sequences, T positions, B rows,
K sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wrpo.rows.errors import DataError, shown
from wrpo.rows.softmax import softmax

IGNORE = -100


@dataclass
class PreferenceCollator:
    """Rows of `tokenize_triples` to one batch in WRPO order: B of source 1, .., B of source K, B target, B rejected.

    Args:
        pad_token_id: written into `input_ids` beyond a sequence's end, where `attention_mask` is 0.
        pad_to_multiple_of: round T up to a multiple of this (tensor cores like 8). Default: None, the longest sequence.
        empty_response: a response without a token to count (empty, or one token that nothing precedes). raise: an
            error; zero: let through, for the loss to leave out. Default: raise.
        reward_temperature: shares are softmax(source_reward / this) over the row's sources, in units of the reward.
            Default: None, the row's source_weight.
        source_models: names of the models whose number goes into `source_id`. Default: None, no source_id.
        with_source_logp: hand `source_logp` on. Default: False.

    Returns a dict with
        input_ids [S, T] int64, attention_mask [S, T] int64, labels [S, T] int64 with S = (K + 2) B;
        source_weight [B, K] float32, the shares of the source answers;
        source_id [B, K] int64, if source_models: the place of the answer's model there (`model_names`), their number
            for any other model, -1 beyond the row's own sources;
        ref_logp [S] float32, if the rows have it (in the order sources, target, rejected);
        source_logp [S, M] float32, if with_source_logp: each response under M models, nats a token of theirs.
    A row with fewer sources than the batch's K repeats its first one with weight 0.

    Raises:
        DataError: a response without a token to count, not one `ref_logp` for each response, or a column that was asked
            for and is missing; the row is named by its place in the batch.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    empty_response: str = "raise"
    reward_temperature: float | None = None
    source_models: Sequence[str] | None = None
    with_source_logp: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if self.empty_response == "raise":  # here, because on a GPU the loss cannot look without waiting for it
            for number, row in enumerate(rows, 1):
                _refuse_empty(row, number)
        count = max(len(row["source_ids"]) for row in rows)
        orders = [_slots(len(row["source_ids"]), count) for row in rows]
        responses = [[*row["source_ids"], row["target_ids"], row["rejected_ids"]] for row in rows]
        pairs = [
            (row["prompt_ids"], answers[order[slot]])
            for slot in range(count + 2)
            for row, answers, order in zip(rows, responses, orders, strict=True)
        ]
        batch = pad_sequences(pairs, self.pad_token_id, self.pad_to_multiple_of)
        shares = [self._shares(row, number) for number, row in enumerate(rows, 1)]
        batch["source_weight"] = torch.tensor(_padded(shares, count, 0.0), dtype=torch.float32)  # [B, K]
        if self.source_models is not None:
            number_of = {name: number for number, name in enumerate(self.source_models)}
            ids = [[number_of.get(name, len(number_of)) for name in model_names(row)] for row in rows]
            batch["source_id"] = torch.tensor(_padded(ids, count, -1))  # [B, K]
        if any("ref_logp" in row for row in rows):
            own = [_reference(row, number) for number, row in enumerate(rows, 1)]
            batch["ref_logp"] = _by_sequence(own, orders)  # [S]
        if self.with_source_logp:
            models = len((rows[0].get("source_logp") or [[]])[0])
            logp = [_source_logp(row, number, models) for number, row in enumerate(rows, 1)]
            batch["source_logp"] = _by_sequence(logp, orders)  # [S, M]
        return batch

    def _shares(self, row: dict, number: int) -> list[float]:
        if self.reward_temperature is None:
            return row["source_weight"]
        rewards = row.get("source_reward")
        if rewards is None or len(rewards) != len(row["source_ids"]):
            raise DataError(
                f"{len(row['source_ids'])} rewards, one for each source",
                shown(rewards),
                "Add the column to the triples, or weigh the sources by source_weight.",
                field="source_reward", file="batch", row=number,
            )  # fmt: skip
        return softmax(rewards, self.reward_temperature)


def model_names(row: dict) -> list[str]:
    """The name of the model behind each source answer of a row; `source 1`, `source 2`, .. where it has none."""
    names = row.get("source_model") or [None] * len(row["source_weight"])
    return [f"source {place}" if name is None else name for place, name in enumerate(names, 1)]


def _padded(by_row: list[list], count: int, filling: float) -> list[list]:
    return [[*values, *[filling] * (count - len(values))] for values in by_row]


def _by_sequence(own: list[list], orders: list[list[int]]) -> torch.Tensor:
    """What each row says of its own responses, in the order of the batch: [S] or [S, M] float32."""
    by_row = [[values[k] for k in order] for values, order in zip(own, orders, strict=True)]
    return torch.tensor(by_row, dtype=torch.float32).transpose(0, 1).flatten(0, 1)  # [B, K + 2, ..] -> [S, ..]


def _slots(own: int, count: int) -> list[int]:
    """Which of a row's own + 2 responses stands in each of the batch's count + 2 slots."""
    return [*range(own), *[0] * (count - own), own, own + 1]


def _refuse_empty(row: dict, number: int) -> None:
    sources = {f"source_ids[{k}]": ids for k, ids in enumerate(row["source_ids"])}
    for name, ids in {**sources, "target_ids": row["target_ids"], "rejected_ids": row["rejected_ids"]}.items():
        if len(ids) <= (not row["prompt_ids"]):
            raise DataError(
                "a response with a token to count",
                f"{ids} after the prompt_ids {shown(row['prompt_ids'])}",
                "Drop the row, or leave such rows out of the loss with empty_response='zero'.",
                field=name, file="batch", row=number,
            )  # fmt: skip


def _reference(row: dict, number: int) -> list[float]:
    values, expected = row.get("ref_logp"), len(row["source_ids"]) + 2
    if values is None or len(values) != expected:
        raise DataError(
            f"{expected} log-probs, one each of {expected - 2} sources, target and rejected",
            "none" if values is None else f"{len(values)}: {shown(values)}",
            "Make the column again from these rows, or remove it from all.",
            field="ref_logp", file="batch", row=number,
        )  # fmt: skip
    return values


def _source_logp(row: dict, number: int, models: int) -> list[list[float]]:
    values, expected = row.get("source_logp"), len(row["source_ids"]) + 2
    if values is None or len(values) != expected or {len(value) for value in values} != {models}:
        raise DataError(
            f"{expected} lists of {models or 'some'} log-probs, one list each of {expected - 2} sources, target and "
            "rejected",
            shown(values),
            "Make the column with `wrpo logp`, from all rows and by the same models.",
            field="source_logp", file="batch", row=number,
        )  # fmt: skip
    return values


@dataclass
class SFTCollator:
    """Rows of `tokenize_triples` to one batch of each row's best source answer (largest weight, the first of equals).

    Args and returned tensors as `PreferenceCollator`, without `source_weight` and `ref_logp`; S = B.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = [(row["prompt_ids"], row["source_ids"][_largest(row["source_weight"])]) for row in rows]
        return pad_sequences(pairs, self.pad_token_id, self.pad_to_multiple_of)


def _largest(weights: list[float]) -> int:
    return max(range(len(weights)), key=lambda k: weights[k])


def pad_sequences(
    pairs: list[tuple[list[int], list[int]]], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
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
        labels[s, max(len(prompt) - 1, 0) : end - 1] = torch.tensor(response if prompt else response[1:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_token(tokenizer: Any, model: Any) -> int:
    """A token id for padding, which no label or attention ever sees."""
    for owner in (tokenizer, getattr(model, "config", None)):
        value = getattr(owner, "pad_token_id", None)
        if isinstance(value, int):
            return value
    return 0
