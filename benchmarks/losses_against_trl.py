"""Every loss of TRL's DPOTrainer, computed by its own code and by `preference_loss`, from the same log-probs.

pip install trl==1.16.0; python -m benchmarks.losses_against_trl

TRL's `DPOTrainer._compute_loss` runs as it is, with a model that answers given log-probs of tokens in the place of a
network. Printed of each loss: the difference of the two values, and the largest of the gradients with respect to the
sequence log-probs, both relative to the largest of TRL's.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrpo_kernels import preference_loss

PAIRS, TOKENS, BETA = 16, 40, 0.1
SMOOTHED = {"label_smoothing": 0.1}
# TRL's name and options, and ours where they differ.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "hinge": ({}, {}),
    "ipo": ({}, {"loss_type": "ipo_norm"}),
    "exo_pair": (SMOOTHED, SMOOTHED),
    "nca_pair": ({}, {}),
    "robust": (SMOOTHED, SMOOTHED),
    "bco_pair": ({}, {}),
    "sppo_hard": ({}, {}),
    "aot": (SMOOTHED, SMOOTHED),
    "aot_unpaired": (SMOOTHED, SMOOTHED),
    "apo_zero": ({}, {}),
    "apo_down": ({}, {}),
    "discopop": ({}, {}),
    "sft": ({}, {}),
    "sigmoid_norm": ({}, {}),
    "sigmoid, bco_pair, sft": ({"loss_weights": [0.8, 0.2, 1.0]},) * 2,
    "sigmoid, forward_kl": ({"f_divergence_type": "forward_kl"},) * 2,
    "hinge, js_divergence": ({"f_divergence_type": "js_divergence"},) * 2,
    "ipo, alpha_divergence": (
        {"f_divergence_type": "alpha_divergence"},
        {"f_divergence_type": "alpha_divergence", "loss_type": "ipo_norm"},
    ),
}
DEFAULTS = {
    "beta": BETA,
    "label_smoothing": 0.0,
    "loss_weights": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
}


class Batch(NamedTuple):
    """B chosen sequences, then B rejected."""

    logp: Tensor  # [2B, T] of tokens, 0 where none counts
    ref_logp: Tensor  # [2B] of sequences
    length: Tensor  # [2B]


def draw_batch() -> Batch:
    torch.manual_seed(0)
    length = torch.randint(5, TOKENS + 1, (2 * PAIRS,))
    counts = torch.arange(TOKENS) < length[:, None]
    logp = (-2 * torch.rand(2 * PAIRS, TOKENS)).masked_fill(~counts, 0.0)
    return Batch(logp, logp.sum(1) + 8 * torch.randn(2 * PAIRS), length)


def of_trl(names: list[str], options: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient by each sequence's log-prob."""
    from trl import DPOTrainer

    logp = batch.logp.clone().requires_grad_()
    zeros = torch.zeros_like(logp)
    answers = SimpleNamespace(
        log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros, aux_loss=None
    )
    own = DEFAULTS | options
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        loss_types=names,
        loss_weights=own.pop("loss_weights") or [1.0] * len(names),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **own,
    )
    counted = torch.arange(TOKENS) < batch.length[:, None]
    # The first position is the prompt, whose label nobody predicts.
    mask = torch.cat([torch.zeros(len(counted), 1, dtype=torch.bool), counted], 1).long()
    chosen, rejected = batch.ref_logp.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: answers, inputs, False)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad[:, 0]


def of_wrpo(names: list[str], options: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor]:
    logp = batch.logp.sum(1).requires_grad_()
    options = {"loss_type": names} | DEFAULTS | options
    loss = preference_loss(
        logp,
        batch.ref_logp,
        seq_weight=torch.tensor([1.0, -1.0]).repeat_interleave(PAIRS),
        group=torch.arange(PAIRS).repeat(2),
        num_groups=PAIRS,
        length=batch.length,
        **options,
    ).loss
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach(), grad


def main() -> None:
    batch = draw_batch()
    print(f"{'loss':<24} {'value':>12} {'loss differs by':>16} {'gradient by':>12}")
    for case, (theirs, ours) in CASES.items():
        names = [name for name in case.split(", ") if name not in (theirs.get("f_divergence_type"),)]
        loss, grad = of_trl(names, theirs, batch)
        own_loss, own_grad = of_wrpo(names, ours, batch)
        differences = [float((a - b).abs().max() / b.abs().max()) for a, b in ((own_loss, loss), (own_grad, grad))]
        print(f"{case:<24} {float(loss):>12.6f} {differences[0]:>16.1e} {differences[1]:>12.1e}")


if __name__ == "__main__":
    main()
