"""What WRPOTrainer promises: the paper's loss, exact accumulation and resumption, plain checkpoints, clear refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, SETTINGS, training_lines, weights, wrpo_trainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wrpo import WRPOConfig, WRPOTrainer
from wrpo.user_error import UserError


# The paper's objectives in float64, written from Table 5 alone. delta: log-ratios, or log-probs over length for SimPO.
def papers_loss(name: str, source, target, rejected, alpha, beta, gamma=0.0, eps=0.0):
    chosen = alpha * source + (1 - alpha) * target
    if name == "ipo":
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    margin = beta * (chosen - rejected) - gamma
    if name == "hinge":
        return torch.relu(1 - margin)
    return -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"loss_type": "sigmoid"}, 0.3),
        ({"loss_type": "sigmoid", "loss_label_smoothing": 0.1, "gamma": 0.2}, 0.3),
        ({"loss_type": "ipo"}, 0.3),
        ({"loss_type": "hinge"}, 0.3),
        ({"loss_type": "simpo", "gamma": 0.5, "reference": "auto"}, 0.3),
        ({"loss_type": "dpo"}, 0.0),
        ({"loss_type": "sigmoid", "nll_weight": 0.7}, 0.3),
        ({"loss_type": "sigmoid", "length_normalize": True}, 0.3),
        ({"loss_type": "ipo", "beta": 0.01, "alpha": 0.1}, 0.1),  # as the paper chose for WRPO_IPO: tau
        ({"loss_type": "simpo", "beta": 10.0, "alpha": 0.5, "reference": "auto"}, 0.5),  # and for WRPO_SimPO
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_loss_is_the_papers_formula_of_the_models_own_logits(settings, alpha, tmp_path):
    """Two sources with shares 1/4 and 3/4; policy and reference are different models."""
    rows = [{**row, "share": [0.25, 0.75, 1.0, 1.0]} for row in tiny_rows(3, sources=2)]
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    needs_reference = settings["loss_type"] != "simpo"
    settings = {"alpha": alpha, "alpha_schedule": "constant", "beta": 0.1, **settings}
    trainer = wrpo_trainer(tmp_path, policy, rows, **settings, ref_model=reference if needs_reference else None)
    batch = preference_batch(rows)
    got = trainer.compute_loss(trainer.model.eval(), batch)

    with torch.no_grad():
        logp = plain_logp(policy, batch)
        score = logp - plain_logp(reference.eval(), batch) if needs_reference else logp
        if settings["loss_type"] == "simpo" or settings.get("length_normalize"):
            score = score / (batch["labels"] != -100).sum(1)
        first, second, target, rejected = score.view(3, 4).t()
        loss = papers_loss(
            settings["loss_type"], 0.25 * first + 0.75 * second, target, rejected, alpha, settings["beta"],
            settings.get("gamma", 0.0), settings.get("loss_label_smoothing", 0.0),
        )  # fmt: skip
        first, second, target, _ = logp.view(3, 4).t()
        preferred = alpha * (0.25 * first + 0.75 * second) + (1 - alpha) * target
        expected = (loss - settings.get("nll_weight", 0.0) * preferred).mean().item()
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reference", ["copy", "adapter"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_first_step_has_a_loss_of_exactly_log_2_and_rewards_of_exactly_zero(reference, bf16, tmp_path):
    model = tiny_model("gemma2-softcap")
    if reference == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    trainer = wrpo_trainer(tmp_path, model, reference=reference, bf16=bf16, max_steps=1)
    trainer.train()
    line = training_lines(trainer)[0]
    assert line["loss"] == torch.tensor(math.log(2)).item()
    assert {line[f"rewards/{name}"] for name in ("chosen", "source_chosen", "target_chosen", "rejected")} == {0.0}


def test_every_step_has_the_schedules_alpha_and_its_micro_batches_share_it(tmp_path):
    trainer = wrpo_trainer(tmp_path, alpha=0.4, gradient_accumulation_steps=2, num_train_epochs=2)
    seen = []
    forward_loss = trainer.forward_loss
    trainer.forward_loss = lambda model, batch, alpha, count: (
        seen.append(alpha),
        forward_loss(model, batch, alpha, count),
    )[1]
    trainer.train()  # 8 rows, 4 a step, 2 epochs: 4 steps
    assert seen == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3], rel=1e-15)
    assert [line["alpha"] for line in training_lines(trainer)] == seen[::2]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_the_whole_batch_however_uneven_its_parts(batch_size, tmp_path):
    """Seven rows: the last micro-batch of 2 and of 4 is smaller."""
    rows = tiny_rows(7)
    whole = wrpo_trainer(tmp_path, rows=rows, per_device_train_batch_size=7, beta=1.0, **ONE_GRADIENT)
    start = weights(whole)
    whole.train()
    steps = -(-7 // batch_size)
    parts = wrpo_trainer(
        tmp_path, rows=rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, beta=1.0,
        **ONE_GRADIENT,
    )  # fmt: skip
    parts.train()
    assert parts.state.global_step == whole.state.global_step == 1
    for name, expected in weights(whole).items():
        change = (expected - start[name]).abs().max().item()
        assert change > 0
        # The same products in another order of summation: a few ulp of the largest, through two layers.
        torch.testing.assert_close(weights(parts)[name], expected, rtol=0, atol=1e-5 * change + 1e-7, msg=name)
    assert training_lines(parts)[0]["loss"] == pytest.approx(training_lines(whole)[0]["loss"], rel=1e-6)


def test_a_resumed_run_is_bit_equal_to_the_uninterrupted_one(tmp_path):
    """With dropout, shuffling, AdamW, a rising alpha and a frozen copy as reference."""

    def run(folder: str, resume: bool = False) -> WRPOTrainer:
        model = tiny_model("gpt2-tied-learned-positions", resid_pdrop=0.3)
        trainer = wrpo_trainer(
            tmp_path / folder,
            model,
            num_train_epochs=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=3,
            beta=0.5,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return trainer

    whole, resumed = run("whole"), run("resumed", resume=True)
    assert whole.state.global_step == 8
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert [
        {k: v for k, v in line.items() if not k.startswith("train_")} for line in training_lines(resumed)
    ] == training_lines(whole)
    assert any(
        not torch.equal(value, expected[name])
        for name, value in tiny_model("gpt2-tied-learned-positions").state_dict().items()
    )


def test_a_saved_model_is_a_plain_transformers_model(tmp_path):
    trainer = wrpo_trainer(tmp_path, max_steps=1, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is LlamaForCausalLM
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in weights(trainer).items()
    }
    assert "head_fn" not in (tmp_path / "saved" / "config.json").read_text()


def test_lora_trains_the_adapters_alone_and_saves_them_alone(tmp_path):
    base = tiny_model()
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    trainer = wrpo_trainer(tmp_path, model, reference="auto", learning_rate=1e-2, beta=1.0, max_steps=3)
    trainer.train()
    frozen = base.state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" in name:
            assert not name.endswith("lora_B.default.weight") or value.abs().max() > 0, f"{name} was not trained"
        else:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), f"{name} changed"
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = preference_batch(tiny_rows(2))
    with torch.no_grad():
        assert torch.equal(plain_logp(loaded, batch), plain_logp(trainer.model.eval(), batch))


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain = wrpo_trainer(tmp_path, beta=1.0, max_steps=1, **ONE_GRADIENT)
    plain.train()
    checkpointed = wrpo_trainer(tmp_path, beta=1.0, max_steps=1, gradient_checkpointing=True, **ONE_GRADIENT)
    checkpointed.train()
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], expected, rtol=0, atol=1e-6, msg=name)


def test_training_with_bfloat16_autocast_lowers_the_loss_and_keeps_float32_weights(tmp_path):
    trainer = wrpo_trainer(tmp_path, bf16=True, beta=1.0, learning_rate=1e-2, num_train_epochs=4)
    trainer.train()
    losses = [line["loss"] for line in training_lines(trainer)]
    assert losses[-1] < 0.5 * losses[0]
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}


def without_response(row: dict) -> dict:
    *preferred, rejected = row["response_ids"]
    return {**row, "prompt_ids": [], "response_ids": [*preferred, rejected[:1]]}  # a token that nothing precedes


def test_a_row_with_an_empty_response_raises_or_counts_nothing(tmp_path):
    rows = tiny_rows(4)
    rows[1] = without_response(rows[1])
    with pytest.raises(ValueError, match=r"batch, row ., field 'response_ids\[2\]': .* empty_response='zero'"):
        wrpo_trainer(tmp_path, rows=rows, per_device_train_batch_size=4, reference="none").train()
    settings = {"per_device_train_batch_size": 4, "reference": "none", **ONE_GRADIENT}
    with_it = wrpo_trainer(tmp_path, rows=rows, empty_response="zero", **settings)
    with_it.train()
    without_it = wrpo_trainer(tmp_path, rows=[rows[0], rows[2], rows[3]], **settings)
    without_it.train()
    for name, expected in weights(without_it).items():
        torch.testing.assert_close(weights(with_it)[name], expected, rtol=0, atol=1e-5, msg=name)
    ours, theirs = training_lines(with_it)[0], training_lines(without_it)[0]
    for name in ("loss", "rewards/chosen", "rewards/accuracies", "logps/rejected"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_named_backend_that_cannot_run_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"kernel_backend='nativ': .* must be one of .*'native'"):
        wrpo_trainer(tmp_path, kernel_backend="nativ")


@pytest.mark.parametrize("processes", [1, 3])
def test_a_loss_without_a_count_is_the_mean_of_its_own_batch(processes, tmp_path, monkeypatch):
    trainer = wrpo_trainer(tmp_path, tiny_model().eval(), ref_model=tiny_model(seed=1))
    batch = preference_batch(tiny_rows(4))
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
    alone = trainer.compute_loss(trainer.model, batch)
    shared = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(4.0 * processes))
    assert alone.item() == pytest.approx(shared.item(), rel=1e-6)


def test_the_log_takes_a_line_before_the_first_step(tmp_path):
    trainer = wrpo_trainer(tmp_path, alpha=0.4)
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[0]["alpha"] == 0.4


def test_several_gpus_in_one_process_are_refused_with_the_way_out(tmp_path):
    args = WRPOConfig(output_dir=str(tmp_path), **SETTINGS)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        WRPOTrainer(tiny_model(), args, train_dataset=tiny_rows())


def test_metrics_that_need_logits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        wrpo_trainer(tmp_path, compute_metrics=lambda _: {})


def test_reference_log_probs_keep_float32_where_deepspeed_would_halve_the_inputs(tmp_path):
    trainer = wrpo_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = trainer._prepare_inputs({"ref_logp": torch.tensor([-500.25]), "share": torch.ones(1)})
    assert batch["ref_logp"].item() == -500.25


def test_training_and_the_reference_pass_leave_the_random_state_of_the_data_alone(tmp_path):
    """The same seed gives the same order of rows, with and without a reference."""

    def lengths(reference: str) -> list[float]:
        trainer = wrpo_trainer(tmp_path / reference, reference=reference, learning_rate=0.0, rows=tiny_rows(12))
        trainer.train()
        return [line["logps/target_chosen"] for line in training_lines(trainer)]

    expected = lengths("none")
    assert len(set(expected)) == 6
    assert lengths("copy") == pytest.approx(expected) == lengths("precompute")


def test_a_run_that_ends_in_weights_that_are_no_numbers_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"training ended in NaN or infinity .*not finite: \d+ parameters"):
        wrpo_trainer(tmp_path, max_steps=2, beta=1.0, **{**ONE_GRADIENT, "learning_rate": 1e38}).train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without an accelerator")
def test_batches_are_pinned_only_for_an_accelerator_unless_the_user_says_otherwise(tmp_path, recwarn):
    trainer = wrpo_trainer(tmp_path, max_steps=1, use_cpu=False)
    trainer.train()
    assert not [str(warning.message) for warning in recwarn if "pin_memory" in str(warning.message)]
    assert trainer.args.dataloader_pin_memory is False
    told = WRPOConfig(output_dir=str(tmp_path), dataloader_pin_memory=True)
    assert told.dataloader_pin_memory is True
