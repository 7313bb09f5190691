"""The SFT stage: the mean negative log-likelihood of the response tokens of a step, exactly, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import plain_logp, sft_batch, tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, SETTINGS

from wrpo import SFTConfig, SFTTrainer


def sft_trainer(folder: Path, rows: list[dict], **settings) -> SFTTrainer:
    args = SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    return SFTTrainer(tiny_model(), args, train_dataset=rows, eval_dataset=rows)


def nll_a_token(rows: list[dict]) -> float:
    batch = sft_batch(rows)
    with torch.no_grad():
        return float(-plain_logp(tiny_model().eval(), batch).sum() / (batch["labels"] != -100).sum())


@pytest.mark.parametrize(("batch_size", "steps"), [(7, 1), (1, 7), (2, 4), (4, 2)])
def test_every_token_of_a_step_counts_alike_in_loss_and_gradient(batch_size, steps, tmp_path):
    rows = tiny_rows(7)
    trainer = sft_trainer(
        tmp_path, rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, **ONE_GRADIENT
    )
    trainer.train()
    model, batch = tiny_model(), sft_batch(rows)
    loss = -plain_logp(model, batch).sum() / (batch["labels"] != -100).sum()
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        expected, change = parameter.detach() - parameter.grad, parameter.grad.abs().max().item()
        assert change > 0
        got = trainer.model.get_parameter(name)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * change + 1e-7, msg=name)


def test_evaluation_weighs_tokens_not_batches(tmp_path):
    rows = tiny_rows(7)
    got = sft_trainer(tmp_path, rows, per_device_eval_batch_size=2).evaluate()["eval_loss"]
    assert got == pytest.approx(nll_a_token(rows), rel=1e-5)


def test_training_on_the_source_responses_makes_them_likely(tmp_path):
    rows = tiny_rows(4)
    trainer = sft_trainer(tmp_path, rows, learning_rate=1e-2, num_train_epochs=20)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before


def test_defaults_are_the_papers_and_the_metrics_file_is_written(tmp_path):
    trainer = sft_trainer(tmp_path, tiny_rows(4), max_steps=1)
    trainer.train()
    assert trainer.args.learning_rate == 7e-6
    assert (tmp_path / "metrics.json").exists()
