"""Rows that a model cannot take, found before it meets them: token ids and positions that its tables do not have.

On a CPU such a row is an IndexError in some later batch, on a GPU it ends the process.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from .lengths import largest_id, longest_sequences

logger = logging.getLogger("wrpo.data")

# Names of the tables of positions in transformers; rotary and ALiBi positions have none.
POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed)$")


def refuse_beyond(rows: Any, model: nn.Module, tokenizer: Any = None, *, place: str = "rows") -> None:
    """Raises ValueError where a token id or a position of tokenised rows is beyond the model's tables.

    Rows that are longer than `max_position_embeddings` of a model that has no table of them are warned of.

    Args:
        rows: of `tokenize_examples`; a stream, which has no length, is not looked at.
        tokenizer: to name the token.
        place: what the rows are called in messages.
    """
    if not hasattr(rows, "__len__") or not len(rows):
        return
    largest, vocabulary = largest_id(rows), vocabulary_size(model)
    if largest >= vocabulary:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise ValueError(
            f"{place}: the token id {largest}{token} is beyond the model's embedding and head, which have {vocabulary} "
            "rows. Take the tokenizer that the model was trained with, or give the model new rows and save it first: "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    lengths = longest_sequences(rows)
    longest = max(lengths)
    table = position_table(model)
    if table is not None and longest > table:
        raise ValueError(
            f"{place}: row {lengths.index(longest)} (counted from 0) has {longest} tokens, and the model has {table} "
            f"positions. Set max_length to {table} or less"
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and longest > trained:
        logger.warning(
            "%s: %d of %d rows are longer than the %d positions that the model was made for (max_position_embeddings); "
            "the longest has %d tokens. Set max_length to cut them",
            place, sum(length > trained for length in lengths), len(lengths), trained, longest,
        )  # fmt: skip


def refuse_unknown(sequences: list[list[int]], size: int, tokenizer: Any) -> None:
    """Raises ValueError where one of the ids is `size` or above."""
    largest = max(max(ids) for ids in sequences)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"the token {token!r} has the id {largest}, and the model has rows for {size} tokens")


def vocabulary_size(model: Any) -> int:
    """Token ids that the model has a row for, in its embedding and its head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [weight for end in ends if (weight := getattr(end, "weight", None)) is not None]
    shapes = [getattr(weight, "ds_shape", weight.shape) for weight in weights]  # ZeRO-3 empties what it has spread
    return min((shape[0] for shape in shapes if len(shape) == 2), default=1 << 62)


def position_table(model: nn.Module) -> int | None:
    """Most tokens of a sequence, where a table of positions bounds them; None: no table."""
    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(name):
            start = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind it
            limits.append(module.num_embeddings - max(start, getattr(module, "offset", 0)))
    tables = (buffer for name, buffer in model.named_buffers() if POSITION_TABLE.search(name))
    limits += [len(table) for table in tables if table.dim() == 2]  # GPT-J's is fixed, and looked up all the same
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*limits, *([declared] if declared else [])]) if limits else None


def keep_padding_inside(tokenizer: Any, model: Any) -> None:
    """Another padding token where the tokenizer's has no row in the model, for which any token serves.

    The one that was there would make an embedding fail although it is masked, and a saved model that cannot be loaded.
    """
    size = vocabulary_size(model)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad < size:
        return
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0)
    token = tokenizer.convert_ids_to_tokens(next(id for id in ids if id is not None and id < size))
    logger.warning(
        "The padding token %r has the id %d, and the model %d rows: %r takes its place, in what is saved too",
        tokenizer.pad_token, pad, size, token,
    )  # fmt: skip
    tokenizer.pad_token = token
