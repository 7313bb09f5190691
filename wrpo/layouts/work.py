"""Operations of a model's body on a batch in one layout, from lengths alone.

    tokens * 2 parameters  +  pairs * 6 * layers * width          forward; the backward takes twice as many of both

with the tokens of all rows, padding among them, the parameters without embedding and head, and the pairs of tokens
that attention multiplies: every pair of a row where it takes a mask, and half of them in padded rows without padding,
for which transformers makes none; where it goes by bounds, half of those of a prompt, or of a prompt with its one
response, and every pair of several responses and their segment. So a long row is not free: sharing saves tokens and may
add pairs. A pair costs 4 * width in the two products of attention, which reach two thirds of the speed of the others
(sdpa with a mask, forward and backward, 300 to 1200 tokens, one core, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from wrpo.data.layout import Layout, Segment, rows_of, width_of

Sizes = Sequence[tuple[int, Sequence[int]]]  # of each example the tokens of its prompt and of each response


class Body:
    """What of a model counts.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: nn.Module):
        config: Any = model.config.get_text_config()
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        of_ends = {id(parameter) for end in ends for parameter in end.parameters()}
        self.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in of_ends)
        self.layers_times_width = getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0)

    def operations(self, batches: Sequence[Sizes], layout: Layout) -> float:
        """Of the forward of all these batches."""
        return sum(self._of_batch(sizes, layout) for sizes in batches)

    def _of_batch(self, sizes: Sizes, layout: Layout) -> float:
        rows = rows_of(sizes, layout)
        width = width_of(rows, layout)
        if layout.attention == "mask":
            is_causal = layout.name == "padded" and all(segment.tokens == width for row in rows for segment in row)
            pairs = len(rows) * width**2 // (2 if is_causal else 1)
        else:
            pairs = sum(_pairs(segment, sizes[segment.example][0]) for row in rows for segment in row)
        return 2.0 * len(rows) * width * self.parameters + 6.0 * pairs * self.layers_times_width


def _pairs(segment: Segment, prompt: int) -> int:
    alone = segment.tokens if segment.last - segment.first == 1 else prompt
    return alone**2 // 2 + (segment.tokens - alone) * segment.tokens
