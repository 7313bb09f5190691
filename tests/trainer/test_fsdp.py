"""Under accelerate's FSDP2 two processes train what one process trains, in the policy's own arithmetic, and save it.

Everything goes through the plugin that `accelerate launch` makes, with its mixed-precision policy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import preference_batch, tiny_model, tiny_rows
from tiny_runs import ONE_GRADIENT, SETTINGS, training_lines
from transformers import AutoModelForCausalLM
from two_processes import allow_fsdp_on_cpus, run_in_two_processes

from wrpo import SFTConfig, SFTTrainer, WRPOConfig, WRPOTrainer
from wrpo.head import run_in_head

PLUGIN = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",  # the default of accelerate
}
FSDP2 = {"fsdp": True, "fsdp_config": PLUGIN}
FROM_FIRST = {"fsdp": True, "fsdp_config": {**PLUGIN, "cpu_ram_efficient_loading": True}}
HALF = {"bf16": True}
# Each response in a row of its own: on a CPU its products then do not depend on the batch, so that the pass over the
# data and the first step, which batch other rows together, have the same bits and not only the same arithmetic.
APART = HALF | {"layout": "padded"}
ODD = 1 + 2**-12  # a number that bfloat16 does not have

RUNS: dict[str, dict] = {
    "float32": FSDP2 | {"reference": "precompute"},
    "precompute": FSDP2 | APART | {"reference": "precompute"},
    "copy": FSDP2 | HALF | {"reference": "copy"},
    "adapter": FSDP2 | HALF | {"reference": "auto"},
    "weights of the first": FROM_FIRST | APART | {"reference": "precompute"},
    "sft": FSDP2 | HALF,
}
PREFERENCE = [run for run in RUNS if run != "sft"]


def opened(run: str, folder: Path, rank: int = 0, **settings: Any) -> Any:
    """Seven rows on two processes, so that one gets a row again; five for evaluation."""
    args = {**SETTINGS, **ONE_GRADIENT, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2, **settings}
    data = {"train_dataset": tiny_rows(7), "eval_dataset": tiny_rows(5, seed=1)}
    model = tiny_model()
    if run == "sft":
        return SFTTrainer(model, SFTConfig(output_dir=str(folder / run), **args), **data)
    if run == "adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    if rank and run in ("weights of the first", "garbage"):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    return WRPOTrainer(model, WRPOConfig(output_dir=str(folder / run), beta=1.0, alpha_start=0.1, **args), **data)


def result(trainer: Any) -> dict:
    trainer.train()
    batch = trainer.data_collator([trainer.eval_dataset[number] for number in range(2)])
    loss = trainer.compute_loss(trainer.model_wrapped, batch)
    evaluated = trainer.evaluate()
    trainer.save_model()
    return {
        "log": {name: v for name, v in training_lines(trainer)[-1].items() if name not in ("grad_norm", "epoch")},
        "evaluated": {name: v for name, v in evaluated.items() if "second" not in name and "time" not in name},
        "loss": loss.detach().item(),
        "type": loss.dtype,
        "kept": through_the_model(trainer.model_wrapped),
    }


def through_the_model(model: Any) -> torch.Tensor:
    """What a head_fn made of a number that a cast to bfloat16 would round, with a gradient."""
    batch = preference_batch(tiny_rows(1))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    out = run_in_head(model, lambda hidden, weight, **_: hidden.float().sum() * 0 + ODD, **inputs)
    assert out.requires_grad
    return out.detach()


def work(rank: int, folder: Path) -> dict:
    allow_fsdp_on_cpus()
    results: dict = {}
    for run, settings in RUNS.items():
        results[run] = result(opened(run, folder, rank, gradient_accumulation_steps=4, **settings))
    for reference in ("precompute", "copy"):
        with pytest.raises(ValueError) as refusal:
            opened("garbage", folder, rank, reference=reference, check_head=False, **FSDP2)
        results[f"garbage {reference}"] = str(refusal.value)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return run_in_two_processes(work, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The float32 run in one process, and where it saved."""
    place = tmp_path_factory.mktemp("alone")
    return {**result(opened("float32", place, gradient_accumulation_steps=8, reference="precompute")), "place": place}


@pytest.mark.parametrize("what", ["log", "evaluated", "loss"])
def test_two_processes_give_the_values_of_one_without_repeated_rows(what, ranks, alone):
    for rank in ranks:
        assert rank["float32"][what] == pytest.approx(alone[what], rel=1e-5, abs=1e-5)


def test_two_processes_save_the_weights_of_one_though_state_dicts_are_sharded(ranks, alone, folder):
    expected = load_file(alone["place"] / "float32" / "model.safetensors")
    saved = load_file(folder / "float32" / "model.safetensors")
    assert saved.keys() == expected.keys()
    start = dict(tiny_model().named_parameters())
    largest = max((expected[name] - start[name].detach()).abs().max().item() for name in expected)
    for name in expected:  # the same terms, added up in another order; half an ulp of weights up to 1 each way
        torch.testing.assert_close(saved[name], expected[name], rtol=0, atol=1e-5 * largest + 2e-7, msg=name)


@pytest.mark.parametrize("run", [run for run in RUNS if run not in ("adapter", "sft")])
def test_a_saved_model_loads_and_has_been_trained(run, ranks, folder):
    start, saved = tiny_model().state_dict(), AutoModelForCausalLM.from_pretrained(folder / run).state_dict()
    assert saved.keys() == start.keys()
    assert not any(torch.equal(saved[name], start[name]) for name in start)


def test_a_saved_adapter_loads_on_its_model(ranks, folder):
    adapted = PeftModel.from_pretrained(tiny_model(), folder / "adapter")
    assert any(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lm_head.lora_B" in name)


@pytest.mark.parametrize("run", PREFERENCE)
def test_the_loss_of_the_first_step_is_log_2_in_the_policys_own_arithmetic(run, ranks):
    for rank in ranks:
        log = rank[run]["log"]
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(log["rewards/chosen"]) + abs(log["rewards/rejected"]) < 1e-4
        assert log["logps/rejected"] < -1


@pytest.mark.parametrize("run", RUNS)
def test_what_the_head_made_keeps_its_type_and_its_bits(run, ranks):
    for rank in ranks:
        assert rank[run]["type"] == torch.float32
        assert rank[run]["kept"].item() == ODD


@pytest.mark.parametrize("run", PREFERENCE)
def test_both_processes_log_and_evaluate_the_same(run, ranks):
    for what in ("log", "evaluated"):
        assert ranks[0][run][what] == ranks[1][run][what]


def test_weights_that_wrapping_replaces_by_those_of_the_first_process_are_never_run(ranks):
    """On the second process they are NaN until then."""
    for what in ("log", "evaluated"):
        expected = ranks[0]["precompute"][what]
        assert ranks[1]["weights of the first"][what] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reference", ["precompute", "copy"])
def test_other_weights_on_another_process_are_refused_before_they_make_a_reference(reference, ranks):
    for rank in ranks:
        assert rank[f"garbage {reference}"].startswith("process 1 has another model than process 0")
