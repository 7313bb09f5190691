"""The fused reference is InfiFPO's: clipped at the policy, fused, on the scale of mean log-probs a token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import training_lines, wrpo_trainer

from wrpo.data import PreferenceCollator
from wrpo.reference.fused import FusedReference, fused_logp
from wrpo.reference.reference import no_reference

# Mean log-probs a token, three sources beside a policy at -1; exact in float32.
SOURCES = [-0.5, -2.0, -0.25]
# Preferred responses are clipped from below, [-0.5, -1, -0.25]; rejected ones from above, [-1, -2, -1].
INVERSE = [2.0, 0.5, 4.0]  # 1 / -log-prob
BY_HAND = {
    "max_margin": (-0.25, -2.0),
    "average": (-1.75 / 3, -4.0 / 3),
    "confidence": ((-0.5 * 2 - 1.0 * 0.5 - 0.25 * 4) / 6.5, (-1.0 * 2 - 2.0 * 0.5 - 1.0 * 4) / 6.5),
}


@pytest.mark.parametrize("fusion", BY_HAND)
def test_the_fused_log_prob_by_hand(fusion):
    """Policy: sums of -4 over 4 tokens and -7 over 7. Source tokens do not enter: their means are given."""
    got = fused_logp(
        torch.tensor([-4.0, -7.0]), torch.tensor([SOURCES, SOURCES]), torch.tensor([4, 7]),
        torch.tensor([False, True]), fusion,
    )  # fmt: skip
    preferred, rejected = BY_HAND[fusion]
    # confidence: the epsilon of 1e-6 nats in its denominators
    assert got.tolist() == pytest.approx([4 * preferred, 7 * rejected], rel=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("fusion", BY_HAND)
def test_sources_that_judge_worse_than_the_policy_leave_it_as_the_reference(fusion):
    own, length = torch.tensor([-4.0, -7.0]), torch.tensor([4, 7])
    worse = torch.tensor([[-1.5, -3.0], [-0.5, -0.25]])  # the preferred response less likely, the rejected one more
    torch.testing.assert_close(fused_logp(own, worse, length, torch.tensor([False, True]), fusion), own)


def test_a_response_without_a_token_has_a_reference_of_zero():
    got = fused_logp(torch.zeros(1), torch.tensor([[-1.0]]), torch.tensor([0]), torch.tensor([False]), "average")
    assert got.tolist() == [0.0]


def test_an_unknown_fusion_is_an_error():
    with pytest.raises(ValueError, match=r"fusion must be one of \['max_margin'"):
        fused_logp(torch.zeros(1), torch.zeros(1, 1), torch.ones(1), torch.zeros(1, dtype=torch.bool), "max")


def rows_with_log_probs(count: int = 3) -> list[dict]:
    """Two sources an example, and each response's mean log-prob under three other models: between -6 and 0 nats."""
    generator = torch.Generator().manual_seed(7)
    return [
        {**row, "share": [0.25, 0.75, 1, 1], "source_logp": (-6 * torch.rand(4, 3, generator=generator)).tolist()}
        for row in tiny_rows(count, sources=2)
    ]


@pytest.mark.parametrize("fusion", BY_HAND)
@pytest.mark.parametrize("reference", ["copy", "precompute"])
def test_the_loss_is_infifpos_with_the_weighted_reward(fusion, reference, tmp_path):
    """Equation 20 in float64 from the models' own logits, row by row."""
    rows = rows_with_log_probs()
    policy, start = tiny_model(seed=0), tiny_model(seed=1)
    trainer = wrpo_trainer(
        tmp_path, policy, rows, ref_model=start, reference=reference, reference_fusion=fusion, length_normalize=True,
        alpha=0.3, alpha_schedule="constant", beta=2.5,
    )  # fmt: skip
    data = [trainer.train_dataset[i] for i in range(3)]
    got = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(data))

    batch = preference_batch(data)
    with torch.no_grad():
        length = (batch["labels"] != -100).sum(1)
        mean = (plain_logp(policy, batch) / length).view(3, 4).t()
        own = (plain_logp(start.eval(), batch) / length).view(3, 4).t()
    losses = []
    for i, row in enumerate(rows):
        ratio = []
        for place in range(4):
            base = own[place, i].item()
            clip = min if place == 3 else max
            clipped = [clip(s, base) for s in row["source_logp"][place]]
            if fusion == "max_margin":
                fused = max(clipped, key=lambda c, base=base: abs(c - base))
            elif fusion == "average":
                fused = sum(clipped) / 3
            else:
                inverse = [1 / -s for s in row["source_logp"][place]]
                fused = sum(g * c for g, c in zip(inverse, clipped, strict=True)) / sum(inverse)
            ratio.append(mean[place, i] - fused)
        chosen = 0.3 * (0.25 * ratio[0] + 0.75 * ratio[1]) + 0.7 * ratio[2]
        losses.append(-F.logsigmoid(2.5 * (chosen - ratio[3])))
    assert got.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_run_with_a_fused_reference_evaluates_and_lowers_its_loss(tmp_path):
    trainer = wrpo_trainer(
        tmp_path, rows=rows_with_log_probs(8), eval_dataset=rows_with_log_probs(3), reference="precompute",
        reference_fusion="max_margin", length_normalize=True, beta=2.5, learning_rate=1e-2, num_train_epochs=4,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert len(training_lines(trainer)) == 16


def test_rows_without_the_column_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"field 'source_logp': expected 3 lists .* `wrpo logp`"):
        wrpo_trainer(tmp_path, reference_fusion="average", length_normalize=True)


def test_a_batch_without_what_is_fused_is_refused():
    batch = PreferenceCollator(0)(tiny_rows(1))
    with pytest.raises(ValueError, match="reference_fusion='average' needs the batch's source_logp"):
        FusedReference(no_reference, "average")(tiny_model(), batch)
