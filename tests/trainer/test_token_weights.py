"""LD-DPO's weights of tokens and WPO's weights of rows, from the models' own logits, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import preference_batch, tiny_model, tiny_rows
from tiny_runs import wrpo_trainer
from torch import Tensor, nn

from wrpo import DPOConfig, WRPOConfig

ROWS, ALPHA, BETA = 4, 0.3, 0.5


class Truth:
    """Of rows with some sources each, their responses [S]; log-probs of tokens in float64, 0 where none counts."""

    def __init__(self, sources: int) -> None:
        self.rows = tiny_rows(ROWS, sources=sources)
        self.batch = preference_batch(self.rows)
        self.counts = self.batch["labels"] != -100
        self.policy, self.reference = tiny_model(seed=0).eval(), tiny_model(seed=1).eval()
        shares = [ALPHA / sources] * sources + [1 - ALPHA] if sources else [1.0]
        self.weight = torch.tensor([*shares, -1.0], dtype=torch.float64).repeat(ROWS)

    def logp(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """log p(y) and log sum_v p(v)^2, [S, T]."""
        with torch.no_grad():
            logits = model(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"]).logits
        every = logits.double().log_softmax(-1)
        mine = every.gather(-1, self.batch["labels"].where(self.counts, 0)[..., None])[..., 0]
        return mine.where(self.counts, 0.0), (2 * every).logsumexp(-1).where(self.counts, 0.0)

    def by_row(self, values: Tensor) -> Tensor:
        return values.view(ROWS, -1).sum(1)

    def margins(self, token_weight: Tensor) -> Tensor:
        ratio = (self.logp(self.policy)[0] - self.logp(self.reference)[0]) * token_weight
        return BETA * self.by_row(self.weight * ratio.sum(1))

    def loss_of_run(self, folder, **settings) -> float:
        settings = {"alpha": ALPHA, "alpha_schedule": "constant", "beta": BETA, **settings}
        trainer = wrpo_trainer(
            folder, self.policy, self.rows, ref_model=self.reference, eval_dataset=self.rows,
            per_device_eval_batch_size=ROWS, **settings,
        )  # fmt: skip
        return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("sources", [0, 2])
@pytest.mark.parametrize(("layout", "reference"), [("padded", "copy"), ("shared", "precompute")])
def test_tokens_beyond_a_rows_shortest_response_weigh_what_ld_alpha_says(layout, reference, sources, tmp_path):
    truth = Truth(sources)
    shortest = truth.counts.sum(1).view(ROWS, -1).amin(1, keepdim=True).expand(-1, len(truth.weight) // ROWS)
    is_tail = truth.counts.cumsum(1) > shortest.reshape(-1, 1)
    assert (is_tail & truth.counts).any()
    expected = -F.logsigmoid(truth.margins(torch.where(is_tail, 0.25, 1.0))).mean().item()
    got = truth.loss_of_run(tmp_path, layout=layout, reference=reference, ld_alpha=0.25)
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sources", [0, 2])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_rows_weigh_as_much_as_they_are_likely_under_the_policy(layout, sources, tmp_path):
    truth = Truth(sources)
    logp, of_squares = truth.logp(truth.policy)
    mean = (logp - of_squares).sum(1) / truth.counts.sum(1)
    weight = truth.by_row(truth.weight.abs() * mean).exp()
    expected = (weight * -F.logsigmoid(truth.margins(torch.ones(())))).mean().item()
    assert truth.loss_of_run(tmp_path, layout=layout, use_weighting=True) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ld_alpha": 1.5}, "ld_alpha: expected a finite number"),
        ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}, "ld_alpha is of log-ratios; sft"),
        ({"ld_alpha": 0.5, "nll_weight": 0.1}, "ld_alpha is of log-ratios; nll_weight"),
        ({"use_weighting": True, "loss_type": "aot"}, "use_weighting weighs rows, but loss_type 'aot'"),
    ],
)
def test_weights_that_a_loss_cannot_have_are_refused(settings, words, tmp_path):
    for config in (WRPOConfig, DPOConfig):
        with pytest.raises(ValueError, match=words):
            config(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_summed_log_probs_of_the_data_are_refused_under_ld_alpha(tmp_path):
    rows = [{**row, "ref_logp": [-1.0] * 3} for row in tiny_rows(ROWS)]
    with pytest.raises(ValueError, match="ld_alpha weighs tokens, but ref_logp of train is a sum"):
        wrpo_trainer(tmp_path, rows=rows, reference="auto", ld_alpha=0.5)
