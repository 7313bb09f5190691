"""Which sequences share a pass over the head, and how the rows of a group that are too many for one are walked.

The coefficient of a sequence s in group g (`preference_loss`) has one part that waits for the group's log-probs:

    c_s = phi'(m_g) u_s - v_s        u_s = n_s beta w_s a_g,  v_s = n_s nll_s: known before any logit

So rows that the budget cannot hold together, or on a CPU better does not, seldom have to be computed twice:

    all u = 0      `known`   c is known: each piece leaves its gradients as it passes
    all v = 0      `scaled`  the pieces leave gradients made with u; the one number phi'(m_g) multiplies their sum
    neither        `twice`   log-probs first; the rows of all pieces but the last are computed again (2DV flops a row)

A `scaled` sum needs totals of its own: those of the call while nothing else is in them, so such a group comes first;
any further one takes a second dW [V, D], whose adding reads and writes 12VD bytes. A row computed again costs 2DV
flops, so a group with fewer rows beyond the budget than 6 flops/bytes, at the speeds of the device, is walked `twice`.
A group that the budget holds goes `whole` rather than `twice` or as a further `scaled` one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wrpo_kernels.preference_loss.family import Sequences

# Rows computed again in the time in which a second dW is added. H200: 780 TFLOP/s in bfloat16, 4.2 TB/s (2026-11-26).
# CPU: 141 to 189 GFLOP/s in float32, 54 GB/s for the adding (2 cores, Zen 4, 2026-11-30).
ROWS_OF_A_TOTAL = {"cpu": 18}
ROWS_OF_A_TOTAL_OF_ACCELERATOR = 1100


class Pass(NamedTuple):
    """Sequences of whole groups; `walk` is "whole" where their rows fit the budget."""

    sequences: list[int]
    walk: str


class Facts(NamedTuple):
    """What the host knows of each sequence."""

    length: list[int]
    group: list[int]
    has_weight: list[int]  # u_s is not zero
    has_nll: list[int]  # v_s is not zero


def facts_of(sequences: Sequences, on_host: Tensor | None) -> Facts:
    """The one place that waits for an accelerator, unless its caller knows lengths and groups, `on_host` [2, S].

    Then the weights, which lie on the device, may be anything but what the arguments rule out.
    """
    length, group, seq_weight, nll = sequences.length, sequences.group, sequences.seq_weight, sequences.nll_weight
    if on_host is not None:
        lengths, groups = on_host.tolist()
        return Facts(lengths, groups, [1] * len(groups), [int(nll is not None)] * len(groups))
    has_nll = torch.zeros_like(length) if nll is None else (nll != 0).to(length.dtype)
    return Facts(*torch.stack([length, group, (seq_weight != 0).to(length.dtype), has_nll]).tolist())


def plan_passes(facts: Facts, num_groups: int, together: int, fit: int, extra_rows: int) -> list[Pass]:
    """Whole groups in order, as many as have at most `together` rows together; first those that are `scaled`.

    fit: a larger group goes whole where it has no more rows, and cannot be walked in pieces without a second dW.
    extra_rows: with fewer rows beyond `fit` a second `scaled` group is walked `twice`.
    """
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for sequence, g in enumerate(facts.group):
        members[g].append(sequence)
    scaled: list[Pass] = []
    others: list[Pass] = []
    room = -1
    for sequences in filter(None, members):
        rows = _rows_of(sequences, facts)
        walk = "whole" if rows <= together else _walk_of(sequences, facts)
        if rows <= fit and (walk == "twice" or (walk == "scaled" and scaled)):
            walk = "whole"
        if walk == "scaled" and scaled and rows - fit < extra_rows:
            walk = "twice"
        if walk == "scaled":
            scaled.append(Pass(sequences, walk))
        elif walk != "whole" or rows > room:
            others.append(Pass([*sequences], walk))
            room = together - rows if walk == "whole" else -1
        else:
            others[-1].sequences.extend(sequences)
            room -= rows
    return scaled + others


def room_of(some: Pass, facts: Facts, together: int, fit: int) -> int:
    """Rows of logits that exist at a time in this pass."""
    if some.walk == "whole":
        return _rows_of(some.sequences, facts)
    return fit if some.walk == "twice" else together


def _rows_of(sequences: list[int], facts: Facts) -> int:
    return sum(facts.length[s] for s in sequences)


def _walk_of(sequences: list[int], facts: Facts) -> str:
    counted = [s for s in sequences if facts.length[s]]
    if not any(facts.has_weight[s] for s in counted):
        return "known"
    return "twice" if any(facts.has_nll[s] for s in counted) else "scaled"


def rows_of_a_total(device: torch.device) -> int:
    return ROWS_OF_A_TOTAL.get(device.type, ROWS_OF_A_TOTAL_OF_ACCELERATOR)
