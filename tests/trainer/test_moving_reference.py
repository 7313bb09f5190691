"""A reference that follows the policy: what it is after each move, in a resumed run too, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from tiny_runs import weights, wrpo_trainer
from transformers import TrainerCallback

from wrpo import WRPOConfig
from wrpo.training.resuming import train_from
from wrpo.user_error import UserError

MOVES = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2, "learning_rate": 1e-2}


class Watch(TrainerCallback):
    def __init__(self):
        self.policy = []

    def on_step_end(self, args, state, control, *, model, **_):
        self.policy.append({name: value.detach().clone() for name, value in model.state_dict().items()})


def test_the_reference_moves_every_few_steps_by_its_share(tmp_path):
    trainer, watch = wrpo_trainer(tmp_path, **MOVES, max_steps=5, reference="auto"), Watch()
    start = weights(trainer)
    trainer.add_callback(watch)
    trainer.train()
    for name, moved in trainer.reference.model.state_dict().items():
        after_two = 0.25 * watch.policy[1][name] + 0.75 * start[name]
        torch.testing.assert_close(moved, 0.25 * watch.policy[3][name] + 0.75 * after_two, msg=name)
    assert not torch.equal(moved, start[name])


def test_a_share_of_1_puts_the_policy_in_its_place(tmp_path):
    moves = MOVES | {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = wrpo_trainer(tmp_path, **moves, max_steps=2)
    trainer.train()
    reference = trainer.reference.model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in weights(trainer).items())


def test_a_resumed_run_goes_on_with_the_reference_as_it_was(tmp_path):
    settings = MOVES | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = wrpo_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = wrpo_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    reference = resumed.reference.model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in whole.reference.model.state_dict().items())


def test_a_checkpoint_of_a_run_that_dies_before_its_callbacks_has_the_reference(tmp_path):
    class Dies(TrainerCallback):
        def on_save(self, *_, **__):
            raise KeyboardInterrupt

    settings = MOVES | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = wrpo_trainer(tmp_path / "died", **settings)
    trainer.callback_handler.callbacks.insert(0, Dies())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = wrpo_trainer(tmp_path / "resumed", **settings)
    resumed._load_from_checkpoint(str(tmp_path / "died" / "checkpoint-2"))
    expected = trainer.reference.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.reference.model.state_dict().items())


def test_a_checkpoint_whose_reference_stood_still_is_refused(tmp_path):
    still = wrpo_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    still.train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(UserError, match="sync_ref_model false then, true now"):
        train_from(wrpo_trainer(tmp_path / "b", **MOVES, max_steps=2), str(checkpoint))
    (checkpoint / "wrpo_run.json").unlink()
    with pytest.raises(UserError, match=r"has no moved_reference\.safetensors; it is of a run without sync_ref_model"):
        train_from(wrpo_trainer(tmp_path / "c", **MOVES, max_steps=2), str(checkpoint))


@pytest.mark.parametrize("settings", [{"reference": "precompute"}, {"reference": "none"}, {"loss_type": "simpo"}])
def test_without_a_copy_there_is_nothing_to_move(settings, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model moves a copy"):
        WRPOConfig(output_dir=str(tmp_path), use_cpu=True, sync_ref_model=True, **settings)


def test_weights_that_do_not_mix_are_refused(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="an adapter's two factors"):
        wrpo_trainer(tmp_path, adapted, **MOVES)
    with pytest.raises(ValueError, match="different shapes"):
        wrpo_trainer(tmp_path, ref_model=tiny_model("gemma2-softcap"), **MOVES)
