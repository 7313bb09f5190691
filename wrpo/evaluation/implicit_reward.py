"""Whether a policy has learnt the preferences of triples it never saw: its implicit rewards against a reference.

    r(y) = beta * (log pi(y|x) - log pi_ref(y|x))

and the share of triples in which r of the sources' answers, of the target's, and of both weighted as WRPO weights them
is above r(rejected). Log-probs come through the fused head: full logits never exist. The two models are gone through
one after the other, so that only one of them needs memory at a time. Source: WRPO, arXiv:2412.03187.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from wrpo.data import PreferenceCollator
from wrpo.head import install_fused_head
from wrpo.head_trainer import pad_token
from wrpo.metrics import preference_metrics
from wrpo.reference import sequence_logp

from .intervals import Interval, wilson_interval

PAIRS = {"source": "source_accuracies", "target": "pivot_accuracies", "weighted": "accuracies"}  # names in wrpo.metrics


@dataclass(frozen=True)
class Accuracy:
    """Share of triples whose chosen answer has the higher implicit reward, strictly; and the mean of the difference."""

    triples: int
    accuracy: float
    interval: Interval
    margin: float


def response_logps(
    model: nn.Module, rows: Sequence[dict], tokenizer: Any, *, batch_size: int, title: str, **options: Any
) -> list[Tensor]:
    """For each row the log-probs [K + 2] float32 of its sources' answers, the target's and the rejected one, in nats.

    Rows are gone through longest first, so that a batch holds little padding and memory runs out at once or never.

    Args:
        model: a causal language model on its device; a fused head is installed and stays.
        rows: of `wrpo.data.tokenize_triples`.
        tokenizer: its padding token fills the batches.
        batch_size: rows in a batch; each is K + 2 sequences.
        title: of the progress bar.
        **options: budget_bytes and backend of `linear_token_logp`.
    """
    install_fused_head(model)
    collator = PreferenceCollator(pad_token(tokenizer, model))
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: -_longest(rows[index]))
    found: dict[int, Tensor] = {}
    with tqdm(total=len(rows), desc=title, unit="triple") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tensors = {name: value.to(device) for name, value in collator([rows[i] for i in batch]).items()}
            logps = sequence_logp(model, tensors, **options).view(-1, len(batch)).cpu()  # [K + 2, B]
            for column, i in enumerate(batch):
                own = [*range(len(rows[i]["source_ids"])), -2, -1]  # without padded sources
                found[i] = logps[own, column]
            bar.update(len(batch))
    return [found[i] for i in range(len(rows))]


def _longest(row: dict) -> int:
    return len(row["prompt_ids"]) + max(map(len, [*row["source_ids"], row["target_ids"], row["rejected_ids"]]))


def implicit_reward_accuracy(
    policy: Sequence[Tensor], reference: Sequence[Tensor], rows: Sequence[dict], *, alpha: float, beta: float
) -> dict[str, Accuracy]:
    """ "source", "target" and "weighted" answers against the rejected one, over all rows (at least one).

    Args:
        policy, reference: of `response_logps`, of the same rows.
        alpha: share of the sources in the weighted reward.
        beta: scale of the rewards, 1/nats; accuracies do not depend on it.
    """
    values: dict[str, list[float]] = {}
    for logp, base, row in zip(policy, reference, rows, strict=True):
        metrics = preference_metrics(logp, beta * (logp - base), torch.tensor([row["source_weight"]]), alpha)
        for name, value in metrics.items():
            values.setdefault(name.removeprefix("rewards/"), []).append(value.item())
    mean = {name: sum(column) / len(rows) for name, column in values.items()}
    chosen = {"source": "source_chosen", "target": "target_chosen", "weighted": "chosen"}
    return {
        pair: Accuracy(
            triples=len(rows),
            accuracy=mean[accuracies],
            interval=wilson_interval(mean[accuracies], len(rows)),
            margin=mean[chosen[pair]] - mean["rejected"],
        )
        for pair, accuracies in PAIRS.items()
    }
