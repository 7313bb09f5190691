"""All sources of reference log-probs agree, none leaves a trace, and a kept one is used only where it is true."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import wrpo_trainer
from torch import nn

from wrpo import WRPOTrainer
from wrpo.reference.fingerprint import model_fingerprint
from wrpo.reference.reference import adapters_off, choose_reference, refuse_partitioned, sequence_logp
from wrpo.user_error import UserError

LORA = LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
# A batch of other rows pads and multiplies in another order: float32 rounding of sums of at most 9 scores of 64 nats.
ATOL = 9 * 64 * torch.finfo(torch.float32).eps


def opened(folder: Path, model: nn.Module, reference: str, rows: list | None = None, **settings) -> WRPOTrainer:
    return wrpo_trainer(folder, model, tiny_rows(sources=2) if rows is None else rows, reference=reference, **settings)


def reference_of(trainer: WRPOTrainer) -> torch.Tensor:
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    return trainer.reference(trainer.model, preference_batch(rows))


@pytest.mark.parametrize("reference", ["copy", "precompute", "adapter"])
def test_every_source_gives_the_log_probs_of_the_models_own_logits(reference, tmp_path):
    model = get_peft_model(tiny_model(), LORA) if reference == "adapter" else tiny_model()
    trainer = opened(tmp_path, model, reference)
    with torch.no_grad():
        expected = plain_logp(tiny_model().eval(), preference_batch(tiny_rows(sources=2)))
        for parameter in trainer.model.parameters():  # what training does to the policy changes no reference
            if parameter.requires_grad:
                parameter.add_(0.1)
    torch.testing.assert_close(reference_of(trainer).double(), expected, rtol=0, atol=ATOL)


def test_rows_with_different_numbers_of_sources_keep_their_own_reference(tmp_path):
    rows = [*tiny_rows(3, sources=1), *tiny_rows(3, sources=3, seed=1)]
    trainer = opened(tmp_path, tiny_model(), "precompute", rows, per_device_eval_batch_size=4)
    for i in range(6):
        row = trainer.train_dataset[i]
        with torch.no_grad():
            alone = plain_logp(tiny_model().eval(), preference_batch([rows[i]]))
        kept = trainer.reference(trainer.model, preference_batch([row]))
        torch.testing.assert_close(kept.double(), alone, rtol=0, atol=ATOL)
        assert {name: value for name, value in row.items() if name != "ref_place"} == rows[i]


def test_a_dataset_stays_one_and_every_evaluation_set_is_gone_through(tmp_path):
    train, first, second = (datasets.Dataset.from_list(tiny_rows(3, seed=seed)) for seed in range(3))
    trainer = opened(tmp_path, tiny_model(), "precompute", train, eval_dataset={"a": first, "b": second})
    assert isinstance(trainer.train_dataset, datasets.Dataset)
    for data in (trainer.train_dataset, *trainer.eval_dataset.values()):
        assert len(data[2]["ref_place"]) == 3
    assert sorted(path.name for path in (tmp_path / "reference").iterdir()) == [
        "eval_a.safetensors", "eval_b.safetensors", "train.safetensors",
    ]  # fmt: skip
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_set_that_was_not_gone_through_is_refused_under_precompute(tmp_path):
    trainer = opened(tmp_path, tiny_model(), "precompute")
    with pytest.raises(ValueError, match="the batch has neither ref_logp nor ref_place"):
        trainer.evaluate(tiny_rows(2))


@pytest.mark.parametrize("reference", ["precompute", "auto"])
def test_a_reference_that_the_data_brings_along_is_used(reference, tmp_path):
    rows = [{**row, "ref_logp": [-1.0, -2.0, -3.0]} for row in tiny_rows(2)]
    trainer = opened(tmp_path, get_peft_model(tiny_model(), LORA), reference, rows)
    assert reference_of(trainer).tolist() == [-1, -2, -3, -1, -2, -3]
    assert not (tmp_path / "reference").exists()


def brought(rows: list[dict]) -> list[dict]:
    return [{**row, "ref_logp": [-1.0] * (len(row["role"]))} for row in rows]


@pytest.mark.parametrize("reference", ["copy", "adapter", "none"])
def test_a_reference_that_the_data_brings_along_and_nothing_would_use_is_refused(reference, tmp_path):
    data = {"rows": tiny_rows(2), "eval_dataset": {"a": brought(tiny_rows(2)), "b": tiny_rows(2)}}
    with pytest.raises(ValueError, match=rf"^eval_a of the data sets train, eval_a, eval_b: .*reference='{reference}'"):
        opened(tmp_path, get_peft_model(tiny_model(), LORA), reference, **data)


def test_data_sets_without_the_reference_that_others_bring_are_named_and_gone_through(tmp_path, caplog):
    trainer = opened(tmp_path, tiny_model(), "auto", brought(tiny_rows(2)), eval_dataset=tiny_rows(2))
    assert "Only train of the data sets train, eval bring the column ref_logp" in caplog.text
    assert reference_of(trainer).tolist() == [-1.0] * 6
    computed = trainer.reference(trainer.model, preference_batch(list(trainer.eval_dataset)))
    torch.testing.assert_close(
        computed.double(), plain_logp(tiny_model().eval(), preference_batch(tiny_rows(2))), rtol=0, atol=ATOL
    )


@pytest.mark.parametrize("rows", [tiny_rows(2), brought(tiny_rows(2))], ids=["computed", "brought"])
def test_an_empty_evaluation_set_is_left_alone(rows, tmp_path, caplog):
    assert opened(tmp_path, tiny_model(), "auto", rows, eval_dataset=[]).eval_dataset == []
    assert "ref_logp" not in caplog.text


def test_a_log_prob_that_is_no_number_is_refused_and_not_kept(tmp_path, monkeypatch):
    from wrpo.training import reference_trainer as module

    real, bad = module.sequence_logp, tiny_rows(8, sources=2)[5]["response_ids"][2]

    def broken(model: nn.Module, batch: dict, **options) -> torch.Tensor:
        own = [row[row != -100].tolist() == bad for row in batch["labels"]]
        return real(model, batch, **options).masked_fill(torch.tensor(own), float("nan"))

    monkeypatch.setattr(module, "sequence_logp", broken)
    with pytest.raises(ValueError, match=r"of 1 responses are not finite, the first in row 5 .*: nan"):
        opened(tmp_path, tiny_model(), "precompute", layout="padded")
    assert not (tmp_path / "reference").exists()


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """One entry for each batch that the precomputation runs through the model."""
    from wrpo.training import reference_trainer as module

    seen, real = [], module.sequence_logp
    monkeypatch.setattr(module, "sequence_logp", lambda *args, **kwargs: (seen.append(1), real(*args, **kwargs))[1])
    return seen


@pytest.fixture
def partitioned(monkeypatch) -> Callable[[nn.Module], nn.Module]:
    """A model as ZeRO-3 leaves it until a forward of the wrapped model, and what gathers its weights until then."""
    whole: dict[int, torch.Tensor] = {}

    def empty(model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.ds_id, parameter.ds_shape = len(whole), parameter.shape
            whole[parameter.ds_id], parameter.data = parameter.data, torch.empty(0)
        return model

    @contextmanager
    def gathered(parameters: list[nn.Parameter]):
        for parameter in parameters:
            parameter.data = whole[parameter.ds_id]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    deepspeed = ModuleType("deepspeed")
    deepspeed.__spec__ = ModuleSpec("deepspeed", None)  # others look whether it is installed
    deepspeed.zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    empty.whole = whole
    return empty


def forbidden(*_args, **_inputs):
    raise AssertionError("a forward of weights that are not there")


@pytest.mark.parametrize("elsewhere", ["ZeRO-3", "meta"])
def test_weights_that_are_elsewhere_are_not_run_before_they_are_there(elsewhere, partitioned, tmp_path, monkeypatch):
    model = get_peft_model(tiny_model(), LORA)
    model = model.to("meta") if elsewhere == "meta" else partitioned(model)
    monkeypatch.setattr(type(model.get_base_model()), "forward", forbidden)
    monkeypatch.setattr(WRPOTrainer, "_move_model_to_device", lambda *_: None)  # as under FSDP and ZeRO-3
    opened(tmp_path, model, "adapter")
    for reference in ("copy", "precompute"):
        with pytest.raises(
            ValueError, match=f"reference='{reference}' runs this model unwrapped.*wrpo logp --reference"
        ):
            refuse_partitioned(model, reference)
    with pytest.raises(ValueError, match=r"reference='auto' cannot run .* use reference='adapter'"):
        choose_reference("auto", model, has_length=False)
    assert choose_reference("auto", model, has_length=True) == "precompute"
    assert choose_reference("adapter", model, has_length=True) == "adapter"
    assert choose_reference("auto", model, has_length=True, has_reference=True) == "precompute"


@pytest.mark.parametrize("reference", ["copy", "precompute"])
def test_a_trainer_of_weights_that_are_elsewhere_takes_a_reference_that_is_there(reference, partitioned, tmp_path):
    model = partitioned(tiny_model())
    with pytest.raises(ValueError, match=f"reference='{reference}' runs this model unwrapped"):
        opened(tmp_path / "none", model, reference)
    trainer = opened(tmp_path / "brought", model, "precompute", brought(tiny_rows(2)))
    assert reference_of(trainer).tolist() == [-1.0] * 6
    kept = reference_of(opened(tmp_path / "kept", tiny_model(), "precompute"))
    assert torch.equal(reference_of(opened(tmp_path / "kept", model, "precompute")), kept)


def test_weights_that_zero_3_has_spread_are_the_same_model(partitioned):
    fingerprint = model_fingerprint(tiny_model(), None, {})
    assert model_fingerprint(partitioned(tiny_model()), None, {}) == fingerprint
    assert model_fingerprint(partitioned(tiny_model(seed=1)), None, {}) != fingerprint


def test_a_head_that_could_not_be_checked_before_it_was_wrapped_is_checked_in_its_first_forward(partitioned, tmp_path):
    """What the config of this family means by its scale shows in the logits alone."""
    family, rows = "hyperclovax-multiplies", brought(tiny_rows(2))
    model = partitioned(tiny_model(family))
    trainer = opened(tmp_path / "spread", model, "precompute", rows, eval_dataset=rows)
    for parameter in model.parameters():
        parameter.data = partitioned.whole[parameter.ds_id]
    expected = opened(tmp_path / "whole", tiny_model(family), "precompute", rows, eval_dataset=rows).evaluate()
    # The same numbers at other addresses, by which torch's products may differ in the last bit.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_what_was_kept_is_used_again(tmp_path, passes, caplog):
    first = reference_of(opened(tmp_path, tiny_model(), "precompute", max_prompt_length=9))
    count = len(passes)
    assert count > 0
    second = reference_of(opened(tmp_path, tiny_model(), "precompute", alpha=0.7, learning_rate=1.0))
    assert len(passes) == count
    assert torch.equal(first, second)
    assert "computing" not in caplog.text


class Tokenizer:
    """As much of one as a fingerprint reads, and a run saves."""

    chat_template = "{{ messages }}"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def save_pretrained(self, folder: str) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rows": tiny_rows(seed=5, sources=2)}, "data"),
        ({"model": tiny_model(seed=5)}, "model"),
        ({"model": tiny_model(rms_norm_eps=1e-3)}, "model"),
        ({"processing_class": Tokenizer()}, "tokenizer"),
        ({"bf16": True}, "settings"),
    ],
    ids=["data", "weights", "config", "tokenizer", "settings"],
)
def test_a_reference_made_from_something_else_is_computed_again_with_a_warning_that_says_what(
    change, word, tmp_path, passes, caplog
):
    opened(tmp_path, tiny_model(), "precompute")
    passes.clear()
    with caplog.at_level(logging.WARNING):
        trainer = opened(tmp_path, **{"model": tiny_model(), "reference": "precompute", **change})
    assert passes
    assert f"was made from another {word}: computing" in caplog.text
    fresh = opened(tmp_path / "fresh", **{"model": tiny_model(), "reference": "precompute", **change})
    assert torch.equal(reference_of(trainer), reference_of(fresh))


@pytest.mark.parametrize("damage", ["cut", "rubbish", "altered"])
def test_a_damaged_file_is_computed_again_with_a_warning(damage, tmp_path, passes, caplog):
    expected = reference_of(opened(tmp_path, tiny_model(), "precompute"))
    path = tmp_path / "reference" / "train.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes({"cut": bytes(content[:-8]), "rubbish": b"no tensors here", "altered": bytes(content)}[damage])
    passes.clear()
    assert torch.equal(reference_of(opened(tmp_path, tiny_model(), "precompute")), expected)
    assert passes
    assert "is damaged" in caplog.text or "cannot be read" in caplog.text
    with safe_open(path, framework="np") as file:
        assert np.isfinite(file.get_tensor("ref_logp")).all()


def test_the_pass_leaves_modes_gradients_and_random_state_alone(tmp_path):
    model = tiny_model("gpt2-tied-learned-positions", resid_pdrop=0.5)
    trainer = opened(tmp_path, model, "copy")
    batch = preference_batch(tiny_rows(2))
    model.train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    first = trainer.reference(model, batch)
    assert torch.equal(first, trainer.reference(model, batch)), "dropout was on"
    assert not first.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_frozen_by_hand_stays_frozen_after_a_pass_without_adapters():
    model = get_peft_model(tiny_model(), LORA)
    frozen = next(p for name, p in model.named_parameters() if "layers.0" in name and "lora_A" in name)
    frozen.requires_grad_(False)
    trained = [p.requires_grad for p in model.parameters()]
    with adapters_off(model):
        pass
    assert [p.requires_grad for p in model.parameters()] == trained


def test_auto_takes_what_is_true_and_cheapest():
    plain, fresh = tiny_model(), get_peft_model(tiny_model(), LORA)
    used = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert choose_reference("auto", plain, has_length=True) == "precompute"
    assert choose_reference("auto", plain, has_length=False) == "copy"
    assert choose_reference("auto", fresh, has_length=True) == "adapter"
    assert choose_reference("auto", used, has_length=True) == "precompute"
    assert choose_reference("auto", fresh, has_length=True, has_reference=True) == "precompute"


def test_adapters_that_hold_a_stage_before_are_warned_of_when_named_as_the_reference(caplog):
    used = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    assert choose_reference("adapter", used, has_length=True) == "adapter"
    assert "the adapters already change the model's output" in caplog.text


@pytest.mark.parametrize("reference", ["auto", "adapter"])
def test_a_trainer_refuses_a_merged_adapter_and_does_not_take_it_out(reference, tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged into its weights"):
        opened(tmp_path, model, reference, check_head=False)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.merged


@pytest.mark.parametrize(
    ("reference", "has_length", "words"),
    [("adapter", True, "needs a PEFT model, got LlamaForCausalLM"), ("precompute", False, "needs data with a length")],
)
def test_a_source_that_cannot_be_had_is_refused(reference, has_length, words):
    with pytest.raises(ValueError, match=words):
        choose_reference(reference, tiny_model(), has_length=has_length)


def test_a_reference_model_that_nothing_would_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_model is given but reference='none'"):
        opened(tmp_path, tiny_model(), "none", ref_model=tiny_model(seed=1))


def test_a_policy_that_has_been_trained_is_not_taken_for_the_reference(tmp_path):
    """As a run that goes on from a checkpoint under FSDP, whose kept log-probs are gone."""
    trainer = opened(tmp_path, tiny_model(), "precompute")
    trainer.reference.values, trainer.reference.table = [None], None
    trainer.state.global_step = 1
    with pytest.raises(UserError, match=r"before training are not in .*train\.safetensors, .* reference_cache_dir"):
        reference_of(trainer)


@pytest.mark.parametrize("reference", ["copy", "precompute"])
def test_float32_logits_are_those_of_the_loss_and_of_the_reference(reference, tmp_path):
    """In the second run what the first one kept was made from other logits."""
    for logits_dtype in ("float32", None):
        model = tiny_model(dtype=torch.bfloat16)
        trainer = wrpo_trainer(tmp_path, model, reference=reference, logits_dtype=logits_dtype, max_steps=1)
        batch = trainer.data_collator(list(trainer.train_dataset))
        wide, narrow = (sequence_logp(model, batch, logits_dtype=dtype) for dtype in (torch.float32, None))
        expected, other = (wide, narrow) if logits_dtype else (narrow, wide)
        got = trainer.reference(model, batch)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(got, other, rtol=0, atol=1e-3)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy = reference"
