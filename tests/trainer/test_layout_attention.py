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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from wrpo.data import PreferenceCollator
from wrpo.data.layout import Layout
from wrpo.head import install_fused_head, run_in_head
from wrpo.head.attention import attention_forms, layer_types, masks, model_inputs, pieces
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


def by_bounds(module, query, key, value, mask, *, scaling, cu_seq_lens_q=None, cu_seq_lens_k=None, **options):
    """As flash-attention computes it: each sequence by itself, causal backwards from its last query and key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (query, key, value)]  # [heads, R T, d]
    whole = range(0, flat[0].shape[1] + 1, query.shape[2])
    queries, keys = (whole if bounds is None else bounds.tolist() for bounds in (cu_seq_lens_q, cu_seq_lens_k))
    out = [
        torch.nn.functional.scaled_dot_product_attention(
            flat[0][:, q:q_end], flat[1][:, k:k_end], flat[2][:, k:k_end], scale=scaling,
            attn_mask=torch.ones(q_end - q, k_end - k, dtype=torch.bool).tril(k_end - k - (q_end - q)),
        )
        for (q, q_end), (k, k_end) in zip(pairwise(queries), pairwise(keys), strict=True)
    ]  # fmt: skip
    return torch.cat(out, 1).unflatten(1, (query.shape[0], -1)).permute(1, 2, 0, 3), None


@pytest.fixture
def flash_model() -> torch.nn.Module:
    AttentionInterface.register("flash_by_hand", by_bounds)
    model = attending_model("llama")
    model.config._attn_implementation = "flash_by_hand"
    install_fused_head(model)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_reach_attention_and_give_the_log_probs_of_padded_rows(flash_model, layout):
    assert attention_forms(flash_model) == ("bounds",)
    in_bounds = Layout(layout, "bounds")
    assert disagreement(flash_model, rows(), PreferenceCollator(0), in_bounds, nullcontext) is None
    batch = PreferenceCollator(0, layout=in_bounds)(rows())
    assert batch["attention_mask"].all(), "no padding"
    whole = torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)
    batch = {name: value for name, value in batch.items() if name not in ("query_bounds", "key_bounds", "key_rows")}
    with torch.no_grad():
        wrong = token_logps(flash_model, batch | {"segment_bounds": whole})[0]
        right = token_logps(flash_model, PreferenceCollator(0)(rows()))[0]
    assert (wrong - right).abs().max() > 0.1


def test_flash_attention_shares_prompts(flash_model):
    options = {"rows": rows(), "collator": PreferenceCollator(0), "batch_size": 5}
    assert choose_layout("auto", flash_model, **options).layout == Layout("shared", "bounds")
    assert choose_layout("packed", flash_model, **options).layout == Layout("packed", "bounds")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_by_pieces_sees_what_a_mask_shows_it(layout):
    """Windows of 4 tokens in every other layer; a response of no tokens, one prompt that no window reaches over."""
    model = attending_model("gemma3")
    some = rows()
    some[1]["response_ids"][1], some[2]["prompt_ids"] = [], some[2]["prompt_ids"][:2]
    batch = PreferenceCollator(0, 16, empty_response="zero", layout=Layout(layout, "bounds"))(some)
    seen = {kind: torch.zeros(by_hand(batch)[0].shape, dtype=torch.bool) for kind in layer_types(model.config)}
    for kind, found in pieces(model, batch).items():
        for queries, keys, mask in found:
            size = queries.stop - queries.start, keys.stop - keys.start
            seen[kind][queries, keys] = torch.ones(size, dtype=torch.bool).tril() if mask is None else mask
    assert torch.equal(seen["full_attention"], by_hand(batch)[0])
    assert torch.equal(seen["sliding_attention"], by_hand(batch, window=4)[0])


def test_sdpa_without_pieces_is_what_it_was():
    """Taught once in a process, and only what a batch brings changes it."""
    model = attending_model("llama")
    install_fused_head(model)
    padded = PreferenceCollator(0)(rows())
    with torch.no_grad():
        before = token_logps(model, padded)[0]
        for _ in range(2):
            token_logps(model, PreferenceCollator(0, layout=Layout("shared", "bounds"))(rows()))
        taught = ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert taught.takes_segments
        assert not getattr(taught.__closure__[0].cell_contents, "takes_segments", False), "not twice"
        assert torch.equal(token_logps(model, padded)[0], before)


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
    eager = attending_model("llama", attn_implementation="eager")
    install_fused_head(eager)
    bounds = PreferenceCollator(0, layout=Layout("packed", "bounds"))(rows())
    with pytest.raises(ValueError, match="is made for attention by bounds, and attn_implementation 'eager'"):
        run_in_head(eager, lambda hidden, weight, **_: hidden.sum(), **model_inputs(bounds))
