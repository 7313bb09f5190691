"""Attention of transformers over the segments of one long row, without a mask of the whole row.

    sdpa    segment by segment: the prompt causally, then its responses over the segment under a mask of their own
    flash   bounds, and with them `key_rows`: the keys and values of a prompt once more before each of its responses

Both come as `segments`, an argument that a model's forward hands on to its attention (`known_by_attention` teaches it
to transformers); without it attention is what it was. A model that drops it would let every token see every other, so
who runs the model asks afterwards whether it arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Sees = Callable[[Any, Any, Any, Any], Tensor]  # (row, head, q, k)


class Piece(NamedTuple):
    """Queries that see some keys of their row; `mask` [queries, keys], None: causally, place by place."""

    queries: slice
    keys: slice
    mask: Tensor | None


class Segments:
    """What attention is told of one row.

    Attributes:
        pieces: by type of layer, what the row is computed in; layers that are given `sliding_window` have a window.
            None: by the bounds that flash-attention is given.
        key_rows: [M] int64, the places of the keys and values that the bounds of keys count. None: all, in order.
        arrived: whether any attention was told.
    """

    def __init__(self, pieces: dict[str, list[Piece]] | None = None, key_rows: Tensor | None = None) -> None:
        self.pieces, self.key_rows, self.arrived = pieces, key_rows, False

    def check_arrived(self, model: str) -> None:
        """Raises ValueError: the model dropped this on the way to its attention."""
        if not self.arrived:
            raise ValueError(
                f"{model} does not tell its attention where the sequences of a row begin, so each sees the others: "
                'use a layout by "mask" (Layout(name, "mask")), or layout padded'
            )


def pieces_of(branch: Tensor, bounds: list[int], sees: Sees, *, is_near: bool) -> list[Piece]:
    """The products of attention that the segments of a row need.

    Args:
        branch: [T], 0 in a prompt.
        bounds: of the segments in the row.
        sees: who sees whom.
        is_near: whether `sees` looks no farther than causal attention alone says, so that a prompt needs a mask too.
    """
    pieces = []
    for start, stop in pairwise(bounds):
        own = branch[start:stop]
        # The first response alone goes on from its prompt: without another, the two are causal together.
        first = stop if int(own[-1]) <= 1 else start + int((own == 0).sum())
        for part, has_mask in ((slice(start, first), is_near), (slice(first, stop), True)):
            if part.start < part.stop:
                keys = slice(start, part.stop)
                pieces.append(Piece(part, keys, _mask(sees, part, keys) if has_mask else None))
    return pieces


def _mask(sees: Sees, queries: slice, keys: slice) -> Tensor:
    q, k = (torch.arange(part.start, part.stop) for part in (queries, keys))
    return sees(0, None, q[:, None], k)


def known_by_attention(name: str) -> None:
    """Teach the attention of this name `segments`, once in a process."""
    inner = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(inner, "takes_segments", False):
        ALL_ATTENTION_FUNCTIONS.register(name, with_segments(inner))


def with_segments(inner: Callable) -> Callable:
    """The attention of transformers `inner`, which also takes `Segments`."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        segments: Segments | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        if segments is None:
            return inner(module, query, key, value, attention_mask, **options)
        segments.arrived = True
        if segments.key_rows is not None:
            key, value = (states.index_select(2, segments.key_rows) for states in (key, value))
        if segments.pieces is None:
            return inner(module, query, key, value, attention_mask, **options)
        kind = "sliding_attention" if options.get("sliding_window") else "full_attention"
        outputs = [
            inner(module, query[:, :, queries], key[:, :, keys], value[:, :, keys], mask, **options)[0]
            for queries, keys, mask in segments.pieces[kind]
        ]
        return torch.cat(outputs, dim=1), None

    attention.takes_segments = True  # type: ignore[attr-defined]
    return attention
