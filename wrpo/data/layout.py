"""Where the tokens of a batch stand: rows of tokens, in which a prompt may stand once for all its responses.

    padded   [x y1 0] [x y2 .] [x y3 .]      each response behind its own copy of the prompt, one to a row
    packed   [x y1 | x y2 | x' y1' ..]       the same, several to a row
    shared   [x | y1 | y2 | y3]              the prompt once: its responses see it and themselves, not each other

A segment is a prompt with the responses that share this copy of it. Segments go into rows first-fit, longest first. In
packed and shared rows every token has

    position_ids   where it would stand in a padded row: each response goes on from the prompt
    segment        the number of its segment in the batch, -1 on padding
    branch         0 in a prompt, k in the k-th response of its segment

and it sees the earlier tokens of its segment that are in the prompt or in its own branch (`wrpo.head.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Example = tuple[list[int], Sequence[list[int]]]  # ids of the prompt, of each response

NAMES = ("padded", "packed", "shared")
ATTENTIONS = ("mask", "blocks", "bounds")


@dataclass(frozen=True)
class Layout:
    """How rows are made up.

    Fields:
        name: padded, packed or shared. Default: padded.
        attention: what the model's attention is told (`wrpo.head.attention`), which decides how long a row gets.
            Default: mask.
            mask: a matrix [T, T] a row, whose cost grows with T squared: no longer than the batch's longest segment.
            blocks: a `BlockMask`, whose empty blocks cost nothing: up to `ROW_TOKENS`.
            bounds: where each segment begins: all in one row without padding.

    Raises:
        ValueError: another word.
    """

    name: str = "padded"
    attention: str = "mask"

    def __post_init__(self) -> None:
        for field, value, names in (("name", self.name, NAMES), ("attention", self.attention, ATTENTIONS)):
            if value not in names:
                raise ValueError(f"the {field} of a layout must be one of {list(names)}, got {value!r}")


PADDED = Layout()
# Most tokens of a row. mask: 64 MiB of bools, which CPUs turn into 256 MiB of float32; blocks: 512 KiB of indices.
ROW_TOKENS = {"mask": 8192, "blocks": 32768, "bounds": 1 << 62}
# Most tokens of a segment with several responses; an example beyond it is spread over several segments, each with the
# prompt. One sequence is never cut.
SEGMENT_TOKENS = {"mask": 8192, "blocks": 32768, "bounds": 8192}
BLOCK = 128  # tokens of a side of a block of flex_attention


class Segment(NamedTuple):
    example: int  # its place in the batch
    first: int  # its responses are [first, last) of the example's
    last: int
    tokens: int


def rows_of(sizes: Sequence[tuple[int, Sequence[int]]], layout: Layout) -> list[list[Segment]]:
    """The segments of each row of a batch.

    Args:
        sizes: of each example the tokens of its prompt and of each response.
    """
    limit = SEGMENT_TOKENS[layout.attention] if layout.name == "shared" else 0
    segments = [segment for place, size in enumerate(sizes) for segment in _segments(place, *size, limit)]
    if layout.name == "padded":
        return [[segment] for segment in segments]
    longest = max(segment.tokens for segment in segments)
    capacity = longest if layout.attention == "mask" else ROW_TOKENS[layout.attention]
    rows: list[list[Segment]] = []
    free: list[int] = []
    for segment in sorted(segments, key=lambda segment: -segment.tokens):
        row = next((row for row, room in enumerate(free) if room >= segment.tokens), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(segment)
        free[row] -= segment.tokens
    return rows


def _segments(example: int, prompt: int, responses: Sequence[int], limit: int) -> list[Segment]:
    """As many responses behind one prompt as fit into `limit` tokens, at least one."""
    segments: list[Segment] = []
    for number, length in enumerate(responses):
        if segments and segments[-1].tokens + length <= limit:
            segments[-1] = segments[-1]._replace(last=number + 1, tokens=segments[-1].tokens + length)
        else:
            segments.append(Segment(example, number, number + 1, prompt + length))
    return segments


def width_of(rows: Sequence[Sequence[Segment]], layout: Layout, multiple: int | None = None) -> int:
    """Tokens of a row, padding among them: as many as the fullest has, rounded up."""
    fullest = max(sum(segment.tokens for segment in row) for row in rows)
    block = BLOCK if layout.attention == "blocks" and layout.name != "padded" else 1
    step = math.lcm(block, multiple or 1)
    return max(1, -(-fullest // step)) * step


def place_tokens(
    examples: Sequence[Example], pad_token_id: int, layout: Layout, multiple: int | None = None
) -> dict[str, Tensor]:
    """A batch in packed or shared rows; S responses, those of the first example, then those of the second, ...

    Returns:
        input_ids, attention_mask (0 on padding), position_ids, segment, branch: [R, T] int64;
        hidden_rows [N] int64: of each response token that counts, the flat place in [R T] of the token that predicts
            it; for the first token of every response that is the last of the prompt;
        labels [N] int64: these tokens, response after response;
        cu_seqlens [S+1] int64: the bounds of the responses in the two;
        segment_bounds int32, where attention takes bounds: those of segments and paddings in the flat rows. In shared
            rows also query_bounds and key_bounds int32, of prompts and of responses, and key_rows int64, which keys
            the latter count: a prompt's again before each response.
    """
    sizes = [(len(prompt), [len(response) for response in responses]) for prompt, responses in examples]
    rows = rows_of(sizes, layout)
    width = width_of(rows, layout, multiple)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "position_ids": 0, "segment": -1, "branch": 0}
    columns = {name: np.full(len(rows) * width, value) for name, value in padding.items()}
    predicting: dict[tuple[int, int], np.ndarray] = {}  # by example and number of the response
    bounds = [0]
    for start, row in zip(range(0, len(rows) * width, width), rows, strict=True):
        at = start
        for segment in row:
            prompt, lengths = sizes[segment.example]
            places = _predicting(at, prompt, lengths[segment.first : segment.last])
            predicting.update(((segment.example, number), place) for number, place in enumerate(places, segment.first))
            taken = slice(at, at + segment.tokens)
            columns["segment"][taken] = len(bounds)
            for name, values in _columns(segment, *examples[segment.example]).items():
                columns[name][taken] = values
            at = taken.stop
            bounds.append(at)
        if at < start + width:
            bounds.append(start + width)
    batch = {name: torch.from_numpy(values).view(len(rows), width) for name, values in columns.items()}
    labels = [counted(prompt, response) for prompt, responses in examples for response in responses]
    batch["hidden_rows"] = torch.from_numpy(np.concatenate([predicting[key] for key in sorted(predicting)]))
    batch["labels"] = torch.from_numpy(np.concatenate([np.array(ids, dtype=np.int64) for ids in labels]))
    batch["cu_seqlens"] = torch.tensor([0, *accumulate(map(len, labels))])
    if layout.attention == "bounds":
        batch["segment_bounds"] = torch.tensor(bounds, dtype=torch.int32)
    if layout == Layout("shared", "bounds"):
        batch |= _bounds_of_branches(columns["branch"], bounds)
    return batch


def _bounds_of_branches(branch: np.ndarray, bounds: Sequence[int]) -> dict[str, Tensor]:
    """`query_bounds`, `key_bounds` and `key_rows` of one row with these segments."""
    queries, keys, rows = [0], [0], []
    for start, stop in pairwise(bounds):
        ends = [start + int(end) for end in np.flatnonzero(np.diff(branch[start:stop])) + 1]
        parts = list(pairwise([start, *ends, stop]))
        prompt = np.arange(*parts[0]) if branch[start] == 0 else np.arange(0)
        for first, last in parts:
            own = np.arange(first, last)
            rows.append(own if branch[first] == 0 else np.concatenate([prompt, own]))
            queries.append(last)
            keys.append(keys[-1] + len(rows[-1]))
    return {
        "query_bounds": torch.tensor(queries, dtype=torch.int32),
        "key_bounds": torch.tensor(keys, dtype=torch.int32),
        "key_rows": torch.from_numpy(np.concatenate(rows)),
    }


def counted(prompt: list[int], response: list[int]) -> list[int]:
    """The response's tokens that something precedes."""
    return response if prompt else response[1:]


def _predicting(start: int, prompt: int, responses: Sequence[int]) -> list[np.ndarray]:
    """Of each response of a segment that begins at `start`, the places that predict its tokens."""
    places, at = [], start + prompt
    for length in responses:
        own = np.arange(at - 1, at - 1 + length)  # each token is predicted by the one before
        if length:
            own[0] = start + prompt - 1  # the first one by the last of the prompt
        places.append(own if prompt else own[1:])
        at += length
    return places


def _columns(segment: Segment, prompt: list[int], responses: Sequence[list[int]]) -> dict[str, Any]:
    """What a segment writes into its row."""
    parts = [prompt, *responses[segment.first : segment.last]]
    lengths = [len(part) for part in parts]
    starts = [0] + [len(prompt)] * (len(parts) - 1)
    return {
        "input_ids": np.concatenate([np.array(part, dtype=np.int64) for part in parts]),
        "attention_mask": 1,
        "position_ids": np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]),
        "branch": np.repeat(np.arange(len(parts)), lengths),
    }
