"""An adapter on the output head changes the fused loss as it changes the model's own logits, or is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import ATOL, assert_fused_is_plain, fused_logp, plain_logp, preference_batch, tiny_model, tiny_rows
from tiny_runs import wrpo_trainer
from transformers import AutoModelForCausalLM

from wrpo.head import adapts_tied_weight, install_fused_head, run_in_head


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return preference_batch(tiny_rows(2))


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "gemma2-softcap", "phi-bias"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_lora_on_and_off_the_head_gives_what_the_model_gives(family, targets, batch):
    model = get_peft_model(tiny_model(family), LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
    assert_fused_is_plain(model, batch)


def test_lora_on_the_head_keeps_what_bfloat16_weights_would_round_away(batch):
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.mul_(1e-3)
    install_fused_head(model)
    model.eval()
    model.bfloat16()
    with torch.no_grad():
        with_adapter = fused_logp(model, batch)
        with model.disable_adapter():
            without = fused_logp(model, batch)
    assert (with_adapter - without).abs().min() > 0


def test_several_active_adapters_on_the_head_add_up(batch):
    config = LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    assert_fused_is_plain(model, batch)


def test_dropout_of_a_lora_on_the_head_falls_on_the_same_hidden_states(batch):
    config = LoraConfig(target_modules=["lm_head"], r=4, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    install_fused_head(model)
    model.train()
    torch.manual_seed(7)
    plain = plain_logp(model, batch)
    torch.manual_seed(7)
    torch.testing.assert_close(fused_logp(model, batch).double(), plain, rtol=0, atol=ATOL)


def test_disabled_adapters_are_the_base_model_and_merged_ones_the_sum(batch):
    base = tiny_model()
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    install_fused_head(model)
    install_fused_head(base)
    adapted = fused_logp(model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logp(model, batch), fused_logp(base, batch), rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(fused_logp(model, batch), adapted, rtol=0, atol=ATOL)
    with model.disable_adapter():  # takes the merged weights out again, to rounding
        torch.testing.assert_close(fused_logp(model, batch), fused_logp(base, batch), rtol=0, atol=ATOL)


def test_a_head_in_modules_to_save_is_the_trained_copy_and_the_original_when_off(batch):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_fused_is_plain(model, batch)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logp(model, batch).double(), plain_logp(model, batch), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "Dora"),
        (LoraConfig(target_modules=["lm_head"], lora_bias=True), "lora_bias"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}), "TrainableTokens"),
    ],
    ids=["dora", "lora-bias", "trainable-tokens"],
)
def test_an_adapter_on_the_head_that_is_not_known_is_named(config, words):
    with pytest.raises(TypeError, match=words):
        install_fused_head(get_peft_model(tiny_model("phi-bias" if config.lora_bias else "llama"), config))


def test_an_adapter_that_adds_positions_is_refused():
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match=r"PROMPT_TUNING.*virtual tokens"):
        install_fused_head(model)


def merged(model: torch.nn.Module) -> torch.nn.Module:
    model.merge_adapter()
    return model


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "head"])
def test_a_merged_adapter_is_refused_by_name_and_stays_merged(targets, batch):
    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = merged(get_peft_model(tiny_model(), config))
    before = plain_logp(model.eval(), batch)
    with pytest.raises(ValueError, match=r"adapter 'default' is merged .*unmerge_adapter\(\).*merge_and_unload\(\)"):
        install_fused_head(model)
    torch.testing.assert_close(plain_logp(model, batch), before, rtol=0, atol=0)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.merged_adapters == ["default"]


@pytest.mark.parametrize("way_out", ["unmerge_adapter", "merge_and_unload"])
def test_either_way_out_of_a_merged_adapter_gives_the_model_that_it_was(way_out, batch):
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    model = merged(get_peft_model(tiny_model(), config)).eval()
    before = plain_logp(model, batch)
    model = getattr(model, way_out)() or model
    install_fused_head(model)
    torch.testing.assert_close(fused_logp(model, batch).double(), before, rtol=0, atol=ATOL)


def test_a_model_merged_after_its_head_was_installed_generates_and_is_refused_by_the_next_trainer(batch):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)).eval()
    install_fused_head(model)
    prompt = batch["input_ids"][:2, :2]
    expected = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False), expected)
    with pytest.raises(ValueError, match="'default' is merged"):
        install_fused_head(model)


def two_adapters(targets: list[str]) -> torch.nn.Module:
    config = LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    install_fused_head(model)
    return model


def test_an_adapter_for_each_row_is_refused_on_the_head_and_leaves_nothing_behind(batch):
    model = two_adapters(["q_proj", "lm_head"])
    before = fused_logp(model, batch)
    names = ["a", "b", "__base__"] * (len(batch["input_ids"]) // 3)
    with pytest.raises(ValueError, match=r"adapter_names .*model.set_adapter\(name\)"):
        run_in_head(model, lambda *_, **__: None, input_ids=batch["input_ids"], adapter_names=names)
    torch.testing.assert_close(fused_logp(model, batch), before, rtol=0, atol=0)


def test_an_adapter_for_each_row_is_taken_where_the_head_has_none(batch):
    model = two_adapters(["q_proj"])
    inputs = {"input_ids": batch["input_ids"], "adapter_names": ["a", "b", "__base__"] * (len(batch["input_ids"]) // 3)}
    logits = run_in_head(model, lambda hidden, weight, **_: hidden @ weight.t(), **inputs)
    torch.testing.assert_close(logits, model(**inputs).logits)


def lora(*targets: str, **options) -> LoraConfig:
    return LoraConfig(target_modules=list(targets), r=4, init_lora_weights=False, **options)


@pytest.mark.parametrize(
    ("family", "config", "is_warned"),
    [
        ("qwen2-tied", lora("lm_head"), True),
        ("qwen2-tied", lora("embed_tokens"), True),
        ("qwen2-tied", lora("lm_head", ensure_weight_tying=True), True),
        ("qwen2-tied", lora("q_proj"), False),
        ("qwen2-tied", lora("q_proj", modules_to_save=["lm_head"]), False),
        ("llama", lora("lm_head"), False),
    ],
    ids=["head", "embedding", "both", "body", "copy", "not-tied"],
)
def test_a_trainer_warns_of_an_adapter_that_merging_would_put_on_both_ends(family, config, is_warned, tmp_path, caplog):
    """PEFT names no way out before training, and advises `ensure_weight_tying`, with which merging is as wrong."""
    model = get_peft_model(tiny_model(family), config)
    wrpo_trainer(tmp_path, model, reference="adapter")
    assert caplog.text.count("which share one weight: merge_and_unload() would change both") == is_warned


@pytest.mark.parametrize("is_untied", [False, True], ids=["tied", "untied"])
def test_merging_gives_what_was_trained_once_the_head_has_a_weight_of_its_own(is_untied, batch, tmp_path):
    """The way out that the warning names, and that what it warns of is so."""
    model = tiny_model("qwen2-tied").eval()
    if is_untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    model = get_peft_model(model, lora("lm_head")).eval()
    assert adapts_tied_weight(model) is not is_untied
    install_fused_head(model)
    trained = fused_logp(model, batch).double()
    model.merge_and_unload().save_pretrained(tmp_path)
    error = (plain_logp(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), batch) - trained).abs().max()
    assert error < ATOL if is_untied else error > 1
