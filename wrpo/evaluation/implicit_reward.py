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

from wrpo.data import PreferenceCollator, load_examples, tokenize_examples
from wrpo.data.batch import on_device
from wrpo.data.collation import pad_token
from wrpo.data.model_limits import refuse_beyond
from wrpo.data.roles import Role
from wrpo.head.fused_head import install_fused_head
from wrpo.layouts import in_layout
from wrpo.pretrained import free_memory, load_model, load_tokenizer, require_template
from wrpo.reference.reference import sequence_logp
from wrpo.settings import ModelSettings
from wrpo.training.metrics import preference_metrics
from wrpo.user_error import UserError

from .intervals import Interval, wilson_interval
from .settings import TriplesSettings

# Names in wrpo.training.metrics: the reward of the preferred side, and how often it wins.
PAIRS = {
    "source": ("source_chosen", "source_accuracies"),
    "target": ("target_chosen", "pivot_accuracies"),
    "weighted": ("chosen", "accuracies"),
}


@dataclass(frozen=True)
class Accuracy:
    """Share of triples whose chosen answer has the higher implicit reward, strictly; and the mean of the difference."""

    triples: int
    accuracy: float
    interval: Interval
    margin: float


def response_logps(
    model: nn.Module,
    rows: Sequence[dict],
    tokenizer: Any,
    *,
    batch_size: int,
    title: str,
    layout: str = "auto",
    **options: Any,
) -> list[Tensor]:
    """For each row the log-probs [R] float32 of its responses, in nats.

    Rows are gone through longest first, so that a batch holds little padding and memory runs out at once or never.

    Args:
        model: a causal language model on its device; a fused head is installed and stays.
        rows: of `wrpo.data.tokenize_examples`.
        tokenizer: its padding token fills the batches.
        batch_size: rows in a batch, each with all its responses.
        title: of the progress bar.
        layout: auto, padded, packed or shared, as `wrpo.layouts.choose_layout` takes it. Default: auto.
        **options: budget_bytes and backend of `linear_token_logp`.

    Raises:
        ValueError: a layout by name that the model cannot have.
    """
    install_fused_head(model)
    collator = PreferenceCollator(pad_token(tokenizer, model))
    collator = in_layout(layout, collator, model, rows, batch_size=batch_size)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda index: -_longest(rows[index]))
    found: dict[int, Tensor] = {}
    with tqdm(total=len(rows), desc=title, unit="triple") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            tensors = on_device(collator([rows[i] for i in batch]), device)
            logps = sequence_logp(model, tensors, **options).cpu().split(tensors["num_responses"].tolist())
            found.update(zip(batch, logps, strict=True))
            bar.update(len(batch))
    return [found[i] for i in range(len(rows))]


def _longest(row: dict) -> int:
    return len(row["prompt_ids"]) + max(map(len, row["response_ids"]))


def accuracy_of_models(options: TriplesSettings) -> dict[str, Accuracy]:
    """Implicit-reward accuracy of `options.policy` against `options.reference` on `options.triples`.

    Raises:
        UserError: triples or models that cannot be loaded, two models of different vocabularies, or a layout by name
            that one of them cannot have.
    """

    def settings(name: str) -> ModelSettings:
        return ModelSettings(
            model_name_or_path=name,
            torch_dtype=options.torch_dtype,
            chat_template_file=options.chat_template_file,
            trust_remote_code=options.trust_remote_code,
        )

    assert options.policy is not None and options.reference is not None  # the settings saw to it
    tokenizer = load_tokenizer(settings(options.policy), "--policy")
    require_template(tokenizer, f"--policy {options.policy!r}", may_be_none=False)
    if load_tokenizer(settings(options.reference), "--reference").get_vocab() != tokenizer.get_vocab():
        raise UserError("--reference has another vocabulary than --policy: name the model that the policy started from")
    rows = list(
        tokenize_examples(
            load_examples(options.triples, skip_bad_rows=options.skip_bad_rows),
            tokenizer,
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            skip_bad_rows=options.skip_bad_rows,
        )
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def logps(name: str, title: str) -> list[Tensor]:
        model = load_model(settings(name), f"--{title}").to(device)
        try:
            refuse_beyond(rows, model, tokenizer, place=f"triples under --{title} {name!r}")
            found = response_logps(
                model, rows, tokenizer, batch_size=options.batch_size, title=title, layout=options.layout
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        del model
        free_memory()  # before the other model is loaded
        return found

    policy, reference = logps(options.policy, "policy"), logps(options.reference, "reference")
    return implicit_reward_accuracy(policy, reference, rows, alpha=options.alpha, beta=options.beta)


def implicit_reward_accuracy(
    policy: Sequence[Tensor], reference: Sequence[Tensor], rows: Sequence[dict], *, alpha: float, beta: float
) -> dict[str, Accuracy]:
    """Of the "source", "target" and "weighted" answers against the rejected ones, over the rows that have them.

    Args:
        policy, reference: of `response_logps`, of the same rows.
        alpha: share of the sources in the weighted reward.
        beta: scale of the rewards, 1/nats; accuracies do not depend on it.
    """
    batch = {
        "num_responses": torch.tensor([len(row["role"]) for row in rows]),
        "role": torch.tensor([Role[role.upper()] for row in rows for role in row["role"]]),
        "share": torch.tensor([share for row in rows for share in row["share"]], dtype=torch.float32),
    }
    logp, base = torch.cat(list(policy)), torch.cat(list(reference))
    values = preference_metrics(logp, beta * (logp - base), batch, alpha)
    rejected = values["rewards/rejected"].value
    found = {}
    for pair, (chosen, accuracies) in PAIRS.items():
        accuracy, holds = values[f"rewards/{accuracies}"]
        if count := int(holds.sum()):
            share = accuracy[holds].double().mean().item()
            margin = (values[f"rewards/{chosen}"].value - rejected)[holds].double().mean().item()
            found[pair] = Accuracy(count, share, wilson_interval(share, count), margin)
    return found
