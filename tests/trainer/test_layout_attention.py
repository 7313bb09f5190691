"""The three forms in which attention is told of packed and shared rows say the same."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from layout_models import attending_model
from tiny_models import tiny_rows
from torch import Tensor
from transformers import AttentionInterface

from wrpo.data import PreferenceCollator
from wrpo.data.layout import Layout
from wrpo.head import install_fused_head, run_in_head
from wrpo.head.attention import attention_form, masks, model_inputs
from wrpo.layouts import choose_layout
from wrpo.layouts.probe import disagreement, token_logps

LAYOUTS = ("packed", "shared")


def rows() -> list[dict]:
    return tiny_rows(5, sources=2)


def by_hand(batch: dict[str, Tensor], window: int | None = None) -> Tensor:
    """[R, T, T] bool, token by token."""
    segment, branch, position = (batch[name].tolist() for name in ("segment", "branch", "position_ids"))
    seen = torch.zeros(*batch["segment"].shape, batch["segment"].shape[1], dtype=torch.bool)
    for r, of_row in enumerate(segment):
        for q in range(len(of_row)):
            for k in range(q + 1):
                of_branch = branch[r][k] in (0, branch[r][q])
                near = window is None or position[r][q] - position[r][k] < window
                seen[r, q, k] = of_row[q] == of_row[k] and of_branch and near
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_true_where_a_token_sees_another(layout):
    batch = PreferenceCollator(0, layout=Layout(layout))(rows())
    made = masks(attending_model("gemma3"), batch["position_ids"], batch["segment"], batch["branch"])
    assert torch.equal(made["full_attention"][:, 0], by_hand(batch))
    assert torch.equal(made["sliding_attention"][:, 0], by_hand(batch, window=4))
    assert not torch.equal(made["full_attention"], made["sliding_attention"])


def test_a_mask_for_eager_attention_is_added_to_the_scores():
    batch = PreferenceCollator(0, layout=Layout("shared"))(rows())
    model = attending_model("llama", attn_implementation="eager")
    made = masks(model, batch["position_ids"], batch["segment"], batch["branch"])
    assert torch.equal(made[:, 0] == 0, by_hand(batch))
    assert made.min() == torch.finfo(torch.float32).min


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_hold_the_same_rule(layout):
    batch = PreferenceCollator(0, layout=Layout(layout, "blocks"))(rows())
    model = attending_model("gemma3", attn_implementation="flex_attention")
    made = masks(model, batch["position_ids"], batch["segment"], batch["branch"])
    place = torch.arange(batch["segment"].shape[1])
    for kind, window in (("full_attention", None), ("sliding_attention", 4)):
        rule = made[kind].mask_mod(torch.tensor(0), None, place[:, None], place)
        assert torch.equal(rule, by_hand(batch, window)[0])


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Compiling takes a minute; without it all pairs are multiplied and then masked."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options) -> Tensor:
        return flex_attention(query, key, value, **options)

    def block_mask(*args, _compile: bool = False, **options) -> object:
        return create_block_mask(*args, **options)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", attention)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", block_mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_attention_gives_the_log_probs_of_padded_rows(layout):
    model = attending_model("gemma3", attn_implementation="flex_attention")
    install_fused_head(model)
    assert disagreement(model, rows(), PreferenceCollator(0), Layout(layout, "blocks"), nullcontext) is None
    batch = PreferenceCollator(0, layout=Layout(layout, "blocks"))(rows())
    assert len(batch["input_ids"]) == 1, "all in one row"
    batch["branch"].clamp_(max=1)  # a response sees those before it
    with torch.no_grad():
        wrong, right = token_logps(model, batch)[0], token_logps(model, PreferenceCollator(0)(rows()))[0]
    assert (wrong - right).abs().max() > (0.1 if layout == "shared" else -1)


def by_bounds(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q=None, **options):
    """As flash-attention computes it: each sequence by itself, causal; without bounds each row."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]  # [heads, R T, d]
    bounds = range(0, flat[0].shape[1] + 1, query.shape[2]) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    out = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, first:last] for x in flat), scale=scaling, is_causal=True
        )
        for first, last in pairwise(bounds)
    ]
    return torch.cat(out, 1).unflatten(1, (query.shape[0], -1)).permute(1, 2, 0, 3), None


@pytest.fixture
def flash_model() -> torch.nn.Module:
    AttentionInterface.register("flash_by_hand", by_bounds)
    model = attending_model("llama")
    model.config._attn_implementation = "flash_by_hand"
    install_fused_head(model)
    return model


def test_bounds_reach_attention_and_give_the_log_probs_of_padded_rows(flash_model):
    assert attention_form(flash_model) == "bounds"
    layout = Layout("packed", "bounds")
    assert disagreement(flash_model, rows(), PreferenceCollator(0), layout, nullcontext) is None
    batch = PreferenceCollator(0, layout=layout)(rows())
    assert batch["attention_mask"].all(), "no padding"
    batch["segment_bounds"] = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
    with torch.no_grad():
        wrong, right = token_logps(flash_model, batch)[0], token_logps(flash_model, PreferenceCollator(0)(rows()))[0]
    assert (wrong - right).abs().max() > 0.1


def test_flash_attention_packs_and_refuses_to_share(flash_model):
    options = {"rows": rows(), "collator": PreferenceCollator(0), "batch_size": 5}
    assert choose_layout("auto", flash_model, **options).layout == Layout("packed", "bounds")
    with pytest.raises(ValueError, match=r"layout 'shared': shared rows need a mask or blocks, .* use packed"):
        choose_layout("shared", flash_model, **options)


def test_an_attention_that_is_not_known_stays_padded(flash_model):
    flash_model.config._attn_implementation = "something_else"
    options = {"rows": rows(), "collator": PreferenceCollator(0), "batch_size": 5}
    reason = "attn_implementation 'something_else' is not known to take a mask, blocks or bounds"
    assert str(choose_layout("auto", flash_model, **options)) == f"padded, {reason}"
    with pytest.raises(ValueError, match="something_else"):
        choose_layout("packed", flash_model, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_in_padding_reaches_nothing(layout):
    model = attending_model("llama")
    install_fused_head(model)
    one, other = (PreferenceCollator(pad, layout=Layout(layout))(rows()) for pad in (0, 5))
    assert not torch.equal(one["input_ids"], other["input_ids"])
    with torch.no_grad():
        assert torch.equal(token_logps(model, one)[0], token_logps(model, other)[0])


def test_a_packed_batch_without_what_tells_the_attention_is_refused():
    model = attending_model("llama")
    install_fused_head(model)
    batch = PreferenceCollator(0, layout=Layout("shared"))(rows())
    with pytest.raises(ValueError, match=r"a batch in packed or shared rows .* goes through run_in_head"):
        model(**model_inputs(batch))
    bounds = PreferenceCollator(0, layout=Layout("packed", "bounds"))(rows())
    with pytest.raises(ValueError, match="is made for attention by bounds, and attn_implementation 'sdpa'"):
        run_in_head(model, lambda hidden, weight, **_: hidden.sum(), **model_inputs(bounds))
