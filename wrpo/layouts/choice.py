"""The layout of a run: the one that saves most of the body's operations, of those under which the model agrees.

    auto     the least operations (`wrpo.layouts.work`) over batches of the data, if that is at most `LARGEST_SHARE` of
             those of padded rows and the probe (`wrpo.layouts.probe`) finds the same log-probs; else the next best;
             else padded
    a name   that one; an error where the probe finds others

So short prompts with responses of like length stay padded, and pay nothing for it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from wrpo.data.collation import with_layout
from wrpo.data.layout import PADDED, Layout
from wrpo.data.lengths import longest_sequences
from wrpo.head.attention import attention_forms
from wrpo.head.fused_head import find_causal_lm

from .probe import disagreement
from .work import Body, Sizes

logger = logging.getLogger("wrpo")

# Longer rows and the gather of hidden states cost a little that `work` does not count.
LARGEST_SHARE = 0.9
SAMPLED = 256  # rows of the data whose lengths are looked at
PROBED = 2  # of the shortest of them, beside the longest: rows that share a row


class Choice(NamedTuple):
    """A layout and why it is that one, for the report of the run."""

    layout: Layout
    reason: str

    def __str__(self) -> str:
        return f"{self.layout.name}, {self.reason}"


def choose_layout(
    wanted: str,
    model: nn.Module,
    rows: Any,
    collator: Any,
    *,
    batch_size: int,
    sorted_by_length: bool = False,
    probe: bool = True,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    wrapped: nn.Module | None = None,
) -> Choice:
    """What `layout` of the settings means for this model and these rows.

    Args:
        wanted: auto, padded, packed or shared.
        model: with a fused head.
        rows: tokenised rows, or None.
        collator: of `wrpo.data`; what it makes of a row is what counts.
        batch_size: rows in a batch.
        sorted_by_length: whether rows of like length come together. Default: False.
        probe: ask the model. Without it a name is believed and auto is padded. Default: True.
        autocast: under which the model runs. Default: none.
        wrapped: what the model is to be run through. Default: itself.

    Raises:
        ValueError: a layout that was asked for by name and the model cannot have.
    """
    if wanted == "padded":
        return Choice(PADDED, "as asked for")
    if rows is None or (hasattr(rows, "__len__") and not len(rows)):
        return _without(wanted, "there are no rows to look at")
    try:
        forms = attention_forms(find_causal_lm(model))
        forms = forms if probe else forms[-1:]  # a mask is what most models take; who takes bounds is seen by asking
    except ValueError as error:
        return _without(wanted, str(error))

    def refusal(layout: Layout) -> str | None:
        return disagreement(wrapped or model, probed(rows), collator, layout, autocast) if probe else None

    if wanted != "auto":
        reasons = []
        for layout in (Layout(wanted, form) for form in forms):
            if (reason := refusal(layout)) is None:
                return Choice(layout, "as asked for")
            reasons.append(reason)
        return _without(wanted, reasons[-1])
    if not hasattr(rows, "__len__"):
        return Choice(PADDED, "a stream cannot be looked at before training; name another layout")
    share = shares_of_work(model, sampled_sizes(rows, collator, batch_size, sorted_by_length), forms)
    if not probe and min(share.values(), default=1.0) <= LARGEST_SHARE:
        return Choice(PADDED, "another layout would save work, but check_head is off; name it, and it is believed")
    return least_work(share, refusal)


def least_work(share: dict[Layout, float], refusal: Callable[[Layout], str | None]) -> Choice:
    """The layout with the least share of the operations of padded rows that the model does not refuse."""
    reasons = []
    for layout in sorted(share, key=share.__getitem__):
        if share[layout] > LARGEST_SHARE:
            break
        if (reason := refusal(layout)) is None:
            return Choice(layout, f"{share[layout]:.2f} of the operations of padded rows")
        reasons.append(reason)
    least = min(share.values(), default=1.0)
    return Choice(PADDED, reasons[0] if reasons else f"no layout saves much ({least:.2f} of the operations)")


def in_layout(wanted: str, collator: Any, model: nn.Module, rows: Any, *, batch_size: int) -> Any:
    """The collator with the layout that the setting means for a pass over rows sorted by length; said once.

    Args and Raises as `choose_layout`.
    """
    choice = choose_layout(wanted, model, rows, collator, batch_size=batch_size, sorted_by_length=True)
    logger.info("layout: %s", choice)
    return with_layout(collator, choice.layout)


def _without(wanted: str, reason: str) -> Choice:
    if wanted == "auto":
        return Choice(PADDED, reason)
    raise ValueError(f"layout {wanted!r}: {reason}. Use layout padded, or auto")


def shares_of_work(model: nn.Module, batches: list[Sizes], forms: Sequence[str]) -> dict[Layout, float]:
    """Of each layout that these batches could have, its operations over those of padded rows."""
    several = any(len(responses) > 1 for sizes in batches for _, responses in sizes)
    names = ["packed", *(["shared"] if several else [])]
    body = Body(find_causal_lm(model))
    padded = body.operations(batches, Layout("padded", forms[-1]))
    layouts = [Layout(name, form) for name in names for form in forms]
    return {layout: body.operations(batches, layout) / padded for layout in layouts}


def sampled_sizes(rows: Any, collator: Any, batch_size: int, sorted_by_length: bool) -> list[Sizes]:
    """Lengths of batches like those of training: the same ones on every process."""
    count = min(len(rows), max(SAMPLED, batch_size))
    drawn = [rows[index] for index in random.Random(0).sample(range(len(rows)), count)]
    sizes = [(len(prompt), [len(ids) for ids in responses]) for prompt, responses in collator.examples(drawn)]
    if sorted_by_length:
        sizes.sort(key=lambda size: size[0] + max(size[1]))
    return [sizes[start : start + batch_size] for start in range(0, count, batch_size)]


def probed(rows: Any) -> list[dict]:
    """The longest row and two of the shortest; of a stream the first ones.

    Raises:
        ValueError: a stream that can be gone through once only.
    """
    if not hasattr(rows, "__len__"):
        if (first := iter(rows)) is rows:
            raise ValueError("a stream that can be gone through only once would lose the rows that are looked at")
        return list(islice(first, PROBED + 1))
    lengths = longest_sequences(rows)
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    return [rows[index] for index in dict.fromkeys([*order[:1], *order[-PROBED:]])]
