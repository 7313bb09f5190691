"""What a run logs is what the names say, over all examples; and what it leaves behind can be looked at."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import wrpo_trainer

from wrpo.training.curves import draw_curves, running_mean, source_panels
from wrpo.training.metrics import Measured, RunningMeans, preference_metrics


def test_metrics_are_what_their_names_say_for_several_examples_and_sources(tmp_path):
    rows = [{**row, "share": [0.25, 0.75, 1.0, 1.0]} for row in tiny_rows(5, sources=2)]
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    trainer = wrpo_trainer(
        tmp_path,
        policy,
        rows,
        eval_dataset=rows,
        ref_model=reference,
        alpha=0.3,
        beta=0.1,
        per_device_eval_batch_size=2,
    )  # batches of 2, 2 and 1 row
    got = trainer.evaluate()

    batch = preference_batch(rows)
    with torch.no_grad():
        logp = plain_logp(policy.eval(), batch)
        first, second, target, rejected = (0.1 * (logp - plain_logp(reference.eval(), batch))).view(5, 4).t()
    source = 0.25 * first + 0.75 * second
    chosen = 0.3 * source + 0.7 * target
    share = [tuple((part > rejected).double().mean().item() for part in (chosen, source, target))]
    assert share[0][2] not in (0.0, 1.0), "the example shows nothing"
    expected = {
        "eval_loss": -F.logsigmoid(chosen - rejected).mean(),
        "eval_rewards/chosen": chosen.mean(),
        "eval_rewards/source_chosen": source.mean(),
        "eval_rewards/target_chosen": target.mean(),
        "eval_rewards/rejected": rejected.mean(),
        "eval_rewards/margins": (chosen - rejected).mean(),
        "eval_rewards/accuracies": share[0][0],
        "eval_rewards/source_accuracies": share[0][1],
        "eval_rewards/pivot_accuracies": share[0][2],
        "eval_logps/source_chosen": (0.25 * logp[::4] + 0.75 * logp[1::4]).mean(),
        "eval_logps/target_chosen": logp[2::4].mean(),
        "eval_logps/rejected": logp[3::4].mean(),
    }
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_an_accuracy_compares_each_example_with_its_own_rejected_response():
    """Both targets beat their own rejected response; of all four pairs of target and rejected, one does not."""
    reward = torch.tensor([0.0, 1.0, 0.5, 3.0, 2.0, 1.5])  # source, target, rejected of two examples
    values = preference_metrics(reward, reward, preference_batch(tiny_rows(2)), alpha=0.5)
    assert values["rewards/pivot_accuracies"].value.tolist() == [1, 1]
    assert values["rewards/source_accuracies"].value.tolist() == [0, 1]
    assert values["rewards/accuracies"].value.tolist() == [0, 1]
    assert values["rewards/margins"].value.tolist() == [0.0, 1.0]


def test_a_value_of_sources_is_the_mean_of_the_rows_that_have_one():
    """A triple, a pair, and a row whose only preferred answer is a source's; two rejected ones in the pair."""
    rows = [*tiny_rows(1), *tiny_rows(1, sources=0, rejected=2), *tiny_rows(1, targets=0)]
    batch = preference_batch(rows)
    reward = torch.tensor([4.0, 2.0, 1.0, 3.0, 0.0, 1.0, 6.0, 8.0])
    means = RunningMeans()
    means.add(preference_metrics(reward, reward, batch, alpha=0.25), torch.ones(3))
    got = means.pop(SimpleNamespace(reduce=lambda sums, _: sums))
    assert got["rewards/source_chosen"] == pytest.approx((4 + 6) / 2)
    assert got["rewards/target_chosen"] == pytest.approx((2 + 3) / 2)
    assert got["rewards/rejected"] == pytest.approx((1 + 0.5 + 8) / 3)
    assert got["rewards/chosen"] == pytest.approx((0.25 * 4 + 0.75 * 2 + 3 + 6) / 3)
    assert got["rewards/source_accuracies"] == pytest.approx(1 / 2)
    assert got["rewards/accuracies"] == pytest.approx(2 / 3)


def test_without_a_source_in_any_row_nothing_of_sources_is_logged(tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=tiny_rows(sources=0), eval_dataset=tiny_rows(2, sources=0), max_steps=1)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    logged = {*line, *trainer.evaluate()}
    assert not [name for name in logged if "source" in name]
    assert {"rewards/target_chosen", "rewards/pivot_accuracies", "eval_rewards/margins"} <= logged


def test_several_evaluation_sets_are_logged_under_their_names_and_may_choose_the_best_checkpoint(tmp_path):
    trainer = wrpo_trainer(
        tmp_path, eval_dataset={"a": tiny_rows(2, seed=1), "b": tiny_rows(3, seed=2)}, eval_strategy="epoch",
        save_strategy="epoch", metric_for_best_model="eval_b_rewards/margins", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    logged = {key for line in trainer.state.log_history for key in line}
    assert {"eval_a_rewards/pivot_accuracies", "eval_b_rewards/pivot_accuracies", "eval_a_loss"} <= logged
    assert trainer.state.best_metric is not None


def test_sums_of_metrics_never_wait_for_the_device():
    """Tensors without data: whatever had to read one would fail."""
    means = RunningMeans()
    for _ in range(2):
        value = Measured(torch.empty(3, device="meta"), torch.empty(3, dtype=torch.bool, device="meta"))
        means.add({"rewards/chosen": value}, torch.ones(3, device="meta"))
    assert means.sums.device.type == "meta"


def test_a_run_leaves_its_log_a_picture_and_tensorboard_events(tmp_path):
    trainer = wrpo_trainer(tmp_path, max_steps=2, draw_curves=True, report_to="tensorboard")
    trainer.train()
    assert json.loads((tmp_path / "metrics.json").read_text())["log_history"] == trainer.state.log_history
    assert (tmp_path / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents*"))
    assert b"rewards/pivot_accuracies" in events


def test_without_matplotlib_the_missing_picture_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    wrpo_trainer(tmp_path, max_steps=1, draw_curves=True).train()
    assert "training_curves.png was not drawn: matplotlib is missing (pip install matplotlib)" in caplog.text
    assert (tmp_path / "metrics.json").exists()


def test_a_log_without_curves_draws_nothing_and_says_why(tmp_path, caplog):
    assert not draw_curves([{"step": 1, "train_runtime": 3.0}], tmp_path / "training_curves.png")
    assert not list(tmp_path.iterdir())
    assert "training_curves.png was not drawn: training ended before the first line of its log" in caplog.text


@pytest.mark.parametrize(("strategy", "is_drawn"), [("no", False), ("steps", True)])
def test_a_run_of_one_step_has_a_picture_if_it_has_a_line_of_the_log(strategy, is_drawn, tmp_path, caplog):
    wrpo_trainer(tmp_path, max_steps=1, draw_curves=True, logging_steps=10, logging_strategy=strategy).train()
    assert (tmp_path / "training_curves.png").exists() is is_drawn
    assert ("training_curves.png was not drawn" in caplog.text) is not is_drawn


def test_the_weights_of_source_models_have_a_panel_of_their_own(tmp_path):
    log = [{"step": step, "loss": 1.0, "source_weight/a": 0.5, "source_weight/google/b": 0.5} for step in (1, 2)]
    (panel,) = source_panels(log)
    assert panel.lines == {"source_weight/a": "a", "source_weight/google/b": "google/b"}
    assert draw_curves(log, tmp_path / "training_curves.png")
    assert not source_panels([{"step": 1, "loss": 1.0}])


def test_a_long_log_is_drawn_with_its_running_mean(tmp_path):
    log = [{"step": step, "loss": 1 / step, "alpha": step / 200, "eval_loss": 0.5} for step in range(1, 201)]
    assert draw_curves(log, tmp_path / "training_curves.png")
    assert running_mean([0.0, 1.0, 2.0, 3.0], 2) == [0.0, 0.5, 1.5, 2.5]
