"""A kept reference is of the model that is there: whatever changes its log-probs changes its fingerprint."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from peft import LoraConfig, get_peft_model
from tiny_models import plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import wrpo_trainer
from torch import nn

from wrpo.reference.fingerprint import PIECE, model_fingerprint, refuse_unequal

LARGE = 4096  # rows of an embedding, of which one is changed


def fingerprint(model: nn.Module) -> str:
    return model_fingerprint(model, None, {})["model"]


def adapted(**changes) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(
        tiny_model(), LoraConfig(**{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **changes})
    )


def test_it_is_the_same_for_the_same_model_and_leaves_it_as_it_is():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fingerprint(model) == fingerprint(tiny_model())
    assert fingerprint(adapted()) == fingerprint(adapted())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_any_parameter_changes_it(dtype):
    model = tiny_model(dtype=dtype)
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1:].view(torch.uint8)
        last[0] ^= 1
        seen.add(fingerprint(model))
        last[0] ^= 1
    assert len(seen) == 1 + len(list(model.parameters()))


def test_a_parameter_of_several_pieces_counts_to_its_last_byte(monkeypatch):
    monkeypatch.setattr("wrpo.reference.fingerprint.PIECE", 100)
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1
    assert fingerprint(model) != before
    assert PIECE > 2**20


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_what_an_adapter_multiplies_by_counts_though_no_weight_differs(change):
    plain, changed = adapted(), adapted(**change)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), changed.parameters(), strict=True))
    assert fingerprint(plain) != fingerprint(changed)


def test_a_model_with_one_edited_token_gets_a_reference_of_its_own(tmp_path):
    rows = [{**row, "prompt_ids": [5, *row["prompt_ids"]]} for row in tiny_rows(4)]
    settings = {"reference": "precompute", "reference_cache_dir": str(tmp_path / "kept"), "rows": rows}
    wrpo_trainer(tmp_path, tiny_model(vocab_size=LARGE), **settings)
    edited = tiny_model(vocab_size=LARGE)
    with torch.no_grad():
        edited.get_input_embeddings().weight[5] += 3
    trainer = wrpo_trainer(tmp_path, edited, **settings)
    batch = preference_batch([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = plain_logp(edited.eval(), batch)
    torch.testing.assert_close(trainer.reference(trainer.model, batch).double(), expected, rtol=1e-5, atol=1e-4)


def test_processes_with_different_models_compute_no_reference_together():
    same = {"data": "1", "model": "2"}
    refuse_unequal([same, dict(same)])
    with pytest.raises(ValueError, match="process 2 has another model than process 0"):
        refuse_unequal([same, same, {"data": "1", "model": "3"}])
