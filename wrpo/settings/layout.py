"""The setting `layout`, the same for every command that goes through rows with a model."""

from __future__ import annotations

from typing import Literal

LayoutName = Literal["auto", "padded", "packed", "shared"]
LAYOUT = (
    "Where the tokens of a batch stand. padded: each response behind its own copy of the prompt, padded to the "
    "longest; packed: the same, several to a row, without padding; shared: the prompt once for all its responses. "
    "The numbers are the same up to rounding. auto: the one with the fewest operations, if it saves a tenth of them "
    "and the model gives the same log-probs on a few rows; said at the start. See docs/layouts.md. Default: auto."
)
