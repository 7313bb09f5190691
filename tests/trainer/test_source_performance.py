"""Weights that follow performance: running means and what follows them are their formulas, in every way to train."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, training_lines, weights, wrpo_trainer

from wrpo.data import PreferenceCollator
from wrpo.training.schedule import adaptive_alpha
from wrpo.training.source_performance import RunningPerformance, source_models_of

MODELS = ["a", "b", "c"]


def closed(performance: RunningPerformance) -> RunningPerformance:
    """After the optimizer step."""
    performance.on_step_end(None, None, None)
    return performance


def batch_of(ids: list[list[int]], share: list[list[float]] | None = None) -> dict[str, torch.Tensor]:
    """Rows with these sources, one target and one rejected response each."""
    share = share or [[1 / len(row)] * len(row) for row in ids]
    return {
        "num_responses": torch.tensor([len(row) + 2 for row in ids]),
        "role": torch.tensor([role for row in ids for role in (*[0] * len(row), 1, 2)]),
        "share": torch.tensor([value for row in share for value in (*row, 1.0, 1.0)]),
        "source_id": torch.tensor([number for row in ids for number in (*row, -1, -1)]),
    }


def of_sources(batch: dict[str, torch.Tensor], values: torch.Tensor) -> list[list[float]]:
    """What the sources of each row have of [S] values."""
    return [part[:-2].tolist() for part in values.split(batch["num_responses"].tolist())]


def two_steps(measure: str, temperature: float = 1.0) -> RunningPerformance:
    """a: margins 1 and 3, then 8; b: -1, then nothing; c: never. Target: margins 2 and -4, then 1."""
    performance = RunningPerformance(MODELS, measure, temperature, decay=0.5)
    both, one = torch.ones(2), torch.ones(1)
    # Two sources, target, rejected; one source, target, rejected.
    performance.add(torch.tensor([1.5, -0.5, 2.5, 0.5, 4.0, -3.0, 1.0]), batch_of([[0, 1], [0]]), both)
    closed(performance)
    performance.add(torch.tensor([9.0, 2.0, 1.0]), batch_of([[0]]), one)
    return closed(performance)


@pytest.mark.parametrize(
    ("measure", "a", "b", "unseen"),
    [
        ("margin", (0.5 * 4 + 8) / (0.5 * 2 + 1), -1.0, (0.5 * 3 + 8) / (0.5 * 3 + 1)),
        ("accuracy", 1.0, 0.0, (0.5 * 2 + 1) / (0.5 * 3 + 1)),
    ],
)
def test_a_running_mean_is_a_mean_of_rows_that_count_less_with_every_step(measure, a, b, unseen):
    """The rows of the step before count half; a model without a row has the mean of all."""
    performance = two_steps(measure)
    assert performance.source_means().tolist() == pytest.approx([a, b, unseen, unseen], rel=1e-12)
    assert performance.target_accuracy().item() == pytest.approx((0.5 * 1 + 1) / (0.5 * 2 + 1), rel=1e-12)


def test_shares_are_the_rows_own_times_the_exponential_of_the_mean_over_the_temperature():
    performance = two_steps("margin", temperature=2.0)
    a, b, unseen = 5.0, -1.0, 3.8
    batch = batch_of([[1, 0], [2, 3], [0]], [[0.75, 0.25], [0.5, 0.5], [1.0]])
    shares = performance.shares(batch)
    got = of_sources(batch, shares)
    first = 0.75 * math.exp(b / 2) / (0.75 * math.exp(b / 2) + 0.25 * math.exp(a / 2))
    assert shares.dtype == torch.float32
    assert got[0] == pytest.approx([first, 1 - first], rel=1e-6)
    assert got[1] == pytest.approx([0.5, 0.5], rel=1e-6)  # both unheard of
    assert got[2] == [1.0]
    assert shares[batch["role"] != 0].tolist() == [1.0] * 6, "targets and rejected ones keep theirs"
    logged = performance.logged()
    assert logged["source_margin/a"] == pytest.approx(a)
    total = sum(math.exp(mean / 2) for mean in (a, b, unseen))
    assert [logged[f"source_weight/{name}"] for name in MODELS] == pytest.approx(
        [math.exp(mean / 2) / total for mean in (a, b, unseen)]
    )


def test_before_the_first_step_the_shares_are_those_of_the_rows():
    performance = RunningPerformance(MODELS, "accuracy", 0.1, decay=0.9)
    own = [[0.125, 0.875], [0.25, 0.75]]
    batch = batch_of([[0, 1], [2, 0]], own)
    torch.testing.assert_close(performance.shares(batch), batch["share"])
    assert performance.target_accuracy().item() == 0.0


def test_a_row_that_counts_nothing_leaves_no_trace_whatever_its_rewards():
    performance = RunningPerformance(MODELS, "margin", 1.0, decay=0.5)
    reward = torch.tensor([1.0, 2.0, 0.0, math.nan, math.inf, math.nan])
    performance.add(reward, batch_of([[0], [1]]), torch.tensor([1.0, 0.0]))
    assert closed(performance).sums[:, -1].tolist() == [1, 0, 0, 0, 1]
    assert performance.source_means()[0].item() == 1.0


def test_following_performance_never_waits_for_the_device():
    """Tensors without data: whatever had to read one would fail."""
    performance = RunningPerformance(MODELS, "margin", 1.0, decay=0.5)
    batch = {name: value.to("meta") for name, value in batch_of([[0, 1], [2]]).items()}
    performance.add(torch.empty(7, device="meta"), batch, torch.ones(2, device="meta"))
    closed(performance)
    assert performance.shares(batch).device.type == "meta"
    alpha = adaptive_alpha(performance.target_accuracy(), start=0.0, end=0.5, goal=0.75)
    assert alpha.device.type == "meta"


def test_names_are_numbered_the_same_in_any_order_of_the_rows():
    import datasets

    rows = [
        {**row, "model": names and [*names, "target", "target"]}
        for row, names in zip(tiny_rows(3, sources=2), (["b", "a"], ["a", None], None), strict=True)
    ]
    expected = ["a", "b", "source 1", "source 2"]
    assert source_models_of(rows) == source_models_of(rows[::-1]) == expected
    assert source_models_of(datasets.Dataset.from_list(rows)) == expected
    assert source_models_of(None) == []


def test_rows_with_one_source_each_have_nothing_to_share_and_that_is_said(caplog):
    assert source_models_of([{**row, "model": ["a", None, None]} for row in tiny_rows(2)]) == ["a"]
    assert "No row has more than one source answer" in caplog.text
    caplog.clear()
    source_models_of(named_rows(2))
    assert not caplog.text


def test_a_stream_whose_models_cannot_be_listed_is_refused(tmp_path):
    import datasets

    stream = datasets.Dataset.from_list(named_rows(2)).to_iterable_dataset()
    with pytest.raises(ValueError, match="has no length; use source_weighting rows or reward"):
        wrpo_trainer(tmp_path, rows=stream, source_weighting="margin", max_steps=1)


# -- in training ------------------------------------------------------------------------------------------------------


def named_rows(count: int = 8) -> list[dict]:
    """Rows with two sources each, of three models in turn."""
    names = [["a", "b"], ["b", "c"], ["c", "a"]]
    return [{**row, "model": [*names[i % 3], None, None]} for i, row in enumerate(tiny_rows(count, sources=2))]


ADAPTIVE = {
    "source_weighting": "margin", "source_temperature": 0.5, "performance_decay": 0.8, "beta": 1.0,
    "alpha_schedule": "adaptive", "alpha_start": 0.1, "alpha": 0.6, "alpha_goal_accuracy": 0.9,
}  # fmt: skip


def recorded(trainer) -> list[dict]:
    """What each micro-batch of the training to come is computed with, and its rewards."""
    seen, forward_loss = [], trainer.forward_loss

    def record(model, batch, alpha, count):
        out = forward_loss(model, batch, alpha, count)
        seen.append({"alpha": float(alpha), "shares": batch["share"].view(-1, 4)[:, :2],
                     "ids": batch["source_id"].view(-1, 4)[:, :2], "step": trainer.state.global_step,
                     "reward": out.reward.view(-1, 4).t().double()})  # fmt: skip
        return out

    trainer.forward_loss = record
    return seen


@pytest.mark.parametrize("measure", ["margin", "accuracy"])
def test_every_micro_batch_of_a_step_has_the_weights_that_the_steps_before_it_give(measure, tmp_path):
    """Recomputed from the rewards alone, row by row."""
    settings = {**ADAPTIVE, "source_weighting": measure, "learning_rate": 1e-2, "num_train_epochs": 3}
    trainer = wrpo_trainer(tmp_path, rows=named_rows(), gradient_accumulation_steps=2, **settings)
    seen = recorded(trainer)
    trainer.train()
    assert trainer.state.global_step == 6

    values: dict = {name: [] for name in range(4)}  # (step, value) of each model; 3 is the target
    for step in range(6):
        means = {
            name: (sum(0.8**-s * v for s, v in pairs) / sum(0.8**-s for s, _ in pairs) if pairs else 0.0)
            for name, pairs in values.items()
        }
        micro_batches = [entry for entry in seen if entry["step"] == step]
        assert len(micro_batches) == 2
        for entry in micro_batches:
            power = torch.tensor([[math.exp(means[int(k)] / 0.5) for k in row] for row in entry["ids"]])
            torch.testing.assert_close(entry["shares"], power / power.sum(1, keepdim=True), rtol=1e-5, atol=0)
            progress = (means[3] - 0.5) / 0.4
            assert entry["alpha"] == pytest.approx(0.1 + 0.5 * min(1.0, max(0.0, progress)), rel=1e-6)
            first, second, target, rejected = entry["reward"]
            for row in range(2):
                for k, reward in ((int(entry["ids"][row, 0]), first), (int(entry["ids"][row, 1]), second), (3, target)):
                    margin = (reward[row] - rejected[row]).item()
                    values[k].append((step, margin if measure == "margin" and k < 3 else float(margin > 0)))
    assert len({entry["alpha"] for entry in seen}) > 2, "alpha never moved"
    lines = training_lines(trainer)
    assert [line["alpha"] for line in lines] == [entry["alpha"] for entry in seen[::2]]
    assert sum(lines[-1][f"source_weight/{name}"] for name in MODELS) == pytest.approx(1.0)
    assert lines[-1][f"source_{measure}/a"] != lines[-1][f"source_{measure}/b"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_weights_do_not_depend_on_how_a_step_is_dealt_out(batch_size, tmp_path):
    runs = []
    for size in (4, batch_size):
        trainer = wrpo_trainer(
            tmp_path / str(size), rows=named_rows(), per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, **{**ONE_GRADIENT, **ADAPTIVE, "learning_rate": 0.01},
        )  # fmt: skip
        trainer.train()
        runs.append([{k: v for k, v in line.items() if k != "grad_norm"} for line in training_lines(trainer)])
    whole, parts = runs
    assert len(whole) == len(parts) == 2
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("restores_callbacks", [False, True])
def test_a_resumed_run_with_weights_that_adapt_is_bit_equal_to_the_uninterrupted_one(restores_callbacks, tmp_path):
    def run(folder: str, resume: bool = False):
        trainer = wrpo_trainer(
            tmp_path / folder, tiny_model("gpt2-tied-learned-positions", resid_pdrop=0.3), named_rows(),
            num_train_epochs=2, learning_rate=1e-2, save_strategy="steps", save_steps=3,
            restore_callback_states_from_checkpoint=restores_callbacks, **ADAPTIVE,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return trainer

    whole, resumed = run("whole"), run("resumed", resume=True)
    assert whole.state.global_step == 8
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert training_lines(resumed) == training_lines(whole)
    assert torch.equal(resumed.performance.sums, whole.performance.sums)
    assert len({line["source_weight/a"] for line in training_lines(whole)}) == 8, "the weights stood still"


def test_a_checkpoint_is_taken_up_by_the_names_of_its_models(tmp_path):
    kept = two_steps("margin")
    later = RunningPerformance(["0 is new", "b", "c", "a"], "margin", 1.0, decay=0.5)
    state = SimpleNamespace(global_step=2, stateful_callbacks={"RunningPerformance": kept.state()})
    later.on_train_begin(SimpleNamespace(device="cpu"), state, None)
    assert torch.equal(later.sums[[3, 1, 2, 4, 5]], kept.sums)
    assert later.sums[0].tolist() == [0, 0, 0]
    again = SimpleNamespace(global_step=0, stateful_callbacks={"RunningPerformance": kept.state()})
    later.on_train_begin(SimpleNamespace(device="cpu"), again, None)
    assert not later.sums.any(), "a run from the start begins with nothing"


def test_a_checkpoint_without_running_means_is_taken_up_with_a_warning(tmp_path, caplog):
    wrpo_trainer(tmp_path, rows=named_rows(), save_strategy="steps", save_steps=2).train()
    later = wrpo_trainer(tmp_path, rows=named_rows(), save_strategy="steps", save_steps=2, **ADAPTIVE)
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "no running means of the sources: they begin anew" in caplog.text
    assert later.state.global_step == 4


def test_off_by_default_and_then_nothing_is_kept_or_logged(tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=named_rows(), max_steps=1)
    trainer.train()
    assert not [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RunningPerformance)]
    assert not [name for name in training_lines(trainer)[0] if name.startswith("source_")]


def test_evaluation_uses_the_weights_of_the_training_and_leaves_them_alone(tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=named_rows(), eval_dataset=named_rows(3), learning_rate=1e-2, **ADAPTIVE)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    sums = trainer.performance.sums.clone()
    seen = recorded(trainer)
    trainer.evaluate()
    assert torch.equal(trainer.performance.sums, sums)
    assert not trainer.performance.step_sums.any()
    expected = trainer.performance.shares(batch_of(seen[0]["ids"].tolist()))
    assert torch.equal(seen[0]["shares"], expected.view(-1, 4)[:, :2])
    assert seen[0]["alpha"] == float(trainer.alpha())


def test_a_collator_of_ones_own_that_names_no_models_is_refused(tmp_path):
    from wrpo import WRPOTrainer

    args = wrpo_trainer(tmp_path, source_weighting="margin").args
    trainer = WRPOTrainer(tiny_model(), args, train_dataset=named_rows(), data_collator=PreferenceCollator(0))
    with pytest.raises(ValueError, match=r"source_weighting='margin': the batch has no source_id"):
        trainer.train()
    args.source_weighting = "reward"
    with pytest.raises(ValueError, match="give it reward_temperature"):
        WRPOTrainer(tiny_model(), args, train_dataset=named_rows(), data_collator=PreferenceCollator(0))


def test_weights_from_rewards_train_like_the_same_weights_in_the_rows(tmp_path):
    """softmax of rewards over a temperature of 1/2, beside rows that bring those shares."""
    rewards = [[0.0, 1.0], [3.0, 2.0], [0.5, 0.5]]
    plain = [{**row, "reward": [*rewards[i % 3], None, None]} for i, row in enumerate(tiny_rows(sources=2))]
    low, high = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))
    shares = [[low, high], [high, low], [0.5, 0.5]]
    weighted = [{**row, "share": [*shares[i % 3], 1.0, 1.0]} for i, row in enumerate(plain)]
    settings = {"alpha": 0.5, "alpha_schedule": "constant", "beta": 1.0, "max_steps": 2, **ONE_GRADIENT}
    ours = wrpo_trainer(tmp_path, rows=plain, source_weighting="reward", source_temperature=0.5, **settings)
    theirs = wrpo_trainer(tmp_path, rows=weighted, **settings)
    ours.train()
    theirs.train()
    for name, expected in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], expected, rtol=0, atol=1e-6, msg=name)
    assert training_lines(ours)[1]["rewards/source_chosen"] != 0.0


@pytest.mark.parametrize(("accuracy", "alpha"), [(0.0, 0.1), (0.5, 0.1), (0.7, 0.3), (0.9, 0.5), (1.0, 0.5)])
def test_an_adaptive_alpha_by_hand_from_one_to_five_tenths(accuracy, alpha):
    got = adaptive_alpha(torch.tensor(accuracy, dtype=torch.float64), start=0.1, end=0.5, goal=0.9)
    assert got.item() == pytest.approx(alpha, rel=1e-12)


def test_an_adaptive_alpha_is_at_its_end_where_nothing_is_being_trained(tmp_path):
    assert wrpo_trainer(tmp_path, alpha=0.4, alpha_schedule="adaptive").alpha() == 0.4
