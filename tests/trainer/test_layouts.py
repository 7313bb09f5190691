"""Packed and shared rows give the log-probs and gradients of padded ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from layout_models import TAKE_A_MASK, TAKE_NONE, InFloat64, attending_model
from tiny_models import VOCABULARY, gradients, tiny_rows
from torch import nn

from wrpo.data import PreferenceCollator
from wrpo.data import layout as places
from wrpo.data.batch import num_counted, sum_by_response
from wrpo.data.layout import PADDED, Layout
from wrpo.evaluation.implicit_reward import response_logps
from wrpo.head import attention, install_fused_head, run_in_head
from wrpo.head.attention import model_inputs
from wrpo.layouts import choose_layout
from wrpo.layouts.probe import disagreement
from wrpo.reference.reference import sequence_logp
from wrpo.reference.source_logp import summed_logp
from wrpo_kernels import linear_token_logp

NAMES = ("packed", "shared")
IN_MASK = [Layout(name, "mask") for name in NAMES]
LAYOUTS = [*IN_MASK, *(Layout(name, "bounds") for name in NAMES)]
LONG = 30


def every(layouts: list[Layout]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", layouts, ids=lambda layout: f"{layout.name} {layout.attention}")


def collated(rows: list[dict], layout: Layout) -> dict[str, torch.Tensor]:
    return PreferenceCollator(0, empty_response="zero", layout=layout)(rows)


def logps(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    def head_fn(hidden, weight, **head):
        tokens = linear_token_logp(hidden, weight, batch["labels"], num_rows=num_counted(batch), **head)
        return sum_by_response(tokens, batch)

    return run_in_head(model, head_fn, **model_inputs(batch))


def in_layout(model: nn.Module, rows: list[dict], layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with InFloat64() if model.dtype == torch.float64 else nullcontext():
        logp = logps(model, collated(rows, layout))
    return logp.detach(), gradients(model, logp)


def rows_of(case: str) -> list[dict]:
    rows = tiny_rows(4, sources=2)
    match case:
        case "one response":
            return [row | {name: row[name][2:] for name in ("response_ids", "role", "share")} for row in tiny_rows(4)]
        case "two responses":
            return tiny_rows(4, sources=0)
        case "five responses":
            return tiny_rows(4, sources=2, rejected=2)
        case "all kinds":
            return [*tiny_rows(2), *tiny_rows(2, sources=0, seed=1), *tiny_rows(1, sources=3, seed=2)]
        case "an empty response":
            rows[1]["response_ids"][2] = []
        case "prompts of one token":
            rows = [row | {"prompt_ids": row["prompt_ids"][:1]} for row in rows]
        case "no prompt":
            rows = [row | {"prompt_ids": [] if number % 2 else row["prompt_ids"]} for number, row in enumerate(rows)]
        case "long prompts":
            generator = torch.Generator().manual_seed(1)
            prompts = torch.randint(3, VOCABULARY, (4, LONG), generator=generator).tolist()
            rows = [row | {"prompt_ids": prompt} for row, prompt in zip(rows, prompts, strict=True)]
    return rows


CASES = ("one response", "two responses", "five responses", "all kinds", "an empty response", "prompts of one token",
         "no prompt", "long prompts")  # fmt: skip


def without_checks(rows: list[dict], monkeypatch) -> list[dict]:
    """Rows of one response are none of preference data; the collator's own check of them is not what is tested."""
    if any(len(row["role"]) == 1 for row in rows):
        monkeypatch.setattr("wrpo.data.collation.check_row", lambda *_: None)
    return rows


@every(LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row_tokens", [LONG - 10, 8192], ids=["prompts longer than a row", "ample rows"])
def test_log_probs_and_gradients_are_those_of_padded_rows(layout, case, row_tokens, monkeypatch):
    monkeypatch.setitem(places.SEGMENT_TOKENS, layout.attention, row_tokens)
    model = attending_model("llama", dtype=torch.float64).eval()
    install_fused_head(model)
    rows = without_checks(rows_of(case), monkeypatch)
    expected, expected_gradients = in_layout(model, rows, PADDED)
    logp, got = in_layout(model, rows, layout)
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, expected_gradients)


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item()
        assert largest > 0, f"{name} has no gradient: nothing is compared"
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("attention_name", "form"), [("sdpa", "bounds"), ("sdpa", "mask"), ("eager", "mask")])
@pytest.mark.parametrize("family", TAKE_A_MASK)
def test_every_family_that_takes_a_mask_gives_the_same_gradients(family, attention_name, form, name):
    model = family_with_attention(family, attention_name).eval()
    install_fused_head(model)
    rows = rows_of("long prompts")
    expected, expected_gradients = in_layout(model, rows, PADDED)
    logp, got = in_layout(model, rows, Layout(name, form))
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(got, expected_gradients)


def family_with_attention(family: str, name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    try:
        return attending_model(family, dtype=dtype, attn_implementation=name)
    except ValueError:
        pytest.skip(f"transformers has no {name} for {family}")


@every(LAYOUTS)
def test_in_float32_the_error_is_that_of_padded_rows(layout):
    """Against float64. Log-probs of responses of up to 9 tokens, 64 nats each, in another order: 9 * 64 ulps."""
    rows = rows_of("five responses")
    exact, single = (attending_model("llama", dtype=dtype).eval() for dtype in (torch.float64, torch.float32))
    exact.load_state_dict({name: value.double() for name, value in single.state_dict().items()})
    for model in (exact, single):
        install_fused_head(model)
    truth, true_gradients = in_layout(exact, rows, PADDED)
    padded, padded_gradients = in_layout(single, rows, PADDED)
    logp, got = in_layout(single, rows, layout)
    rounding = torch.finfo(torch.float32).eps
    assert (logp - truth).abs().max() <= (padded - truth).abs().max() + 9 * 64 * rounding
    for name, value in true_gradients.items():
        theirs = (padded_gradients[name] - value).abs().max()
        assert (got[name] - value).abs().max() <= theirs + 16 * rounding * value.abs().max(), name


@every(LAYOUTS)
def test_the_same_batch_gives_the_same_bits(layout):
    model = attending_model("llama").eval()
    install_fused_head(model)
    first, second = (in_layout(model, rows_of("five responses"), layout) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", TAKE_A_MASK)
def test_the_probe_agrees_with_families_that_take_a_mask(family, name):
    model = attending_model(family)
    install_fused_head(model)
    for layout in (Layout(name, form) for form in attention.attention_forms(model)):
        assert disagreement(model, rows_of("long prompts"), PreferenceCollator(0), layout, nullcontext) is None


def test_a_model_whose_layers_drop_what_they_do_not_know_goes_by_a_mask():
    """The bounds reach no attention then: every token would see every other."""
    model = attending_model("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, segments=None, inner=inner, **given: inner(*args, **given)
    install_fused_head(model)
    options = {"rows": rows_of("long prompts"), "collator": PreferenceCollator(0), "batch_size": 2}
    assert choose_layout("auto", model, **options).layout.attention == "mask"
    assert choose_layout("shared", model, **options).layout == Layout("shared", "mask")
    with pytest.raises(ValueError, match="LlamaForCausalLM does not tell its attention where the sequences of a row"):
        logps(model, collated(rows_of("long prompts"), Layout("shared", "bounds")))


def test_without_a_probe_rows_go_by_a_mask():
    model = attending_model("llama")
    install_fused_head(model)
    options = {"rows": rows_of("long prompts"), "collator": PreferenceCollator(0), "batch_size": 2, "probe": False}
    assert choose_layout("shared", model, **options).layout == Layout("shared", "mask")


@pytest.mark.parametrize("family", [name for name in TAKE_A_MASK if "sliding_window" in TAKE_A_MASK[name][1]])
def test_the_probe_sees_a_window_that_a_mask_has_forgotten(family, monkeypatch):
    """Under autocast too, whose rounding would hide it."""
    model = attending_model(family)
    install_fused_head(model)
    monkeypatch.setattr(attention, "layer_types", lambda _config: ["full_attention"])
    reason = disagreement(model, rows_of("long prompts"), PreferenceCollator(0), Layout("shared"), in_bfloat16)
    assert "gives other log-probs in shared rows than in padded ones: they differ by" in reason


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("family", TAKE_NONE)
def test_models_that_take_no_mask_run_padded_and_say_why(family):
    model = attending_model(family)
    install_fused_head(model)
    options = {"rows": rows_of("long prompts"), "collator": PreferenceCollator(0), "batch_size": 2}
    choice = choose_layout("auto", model, **options)
    assert choice.layout.name == "padded"
    assert f"shared rows do not go through {type(model).__name__}" in choice.reason
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"layout '{name}': {name} rows do not go .* Use layout padded, or auto"):
            choose_layout(name, model, **options)


def test_a_model_that_drops_its_mask_is_found_out():
    model = attending_model("llama")
    plain = model.model.forward
    model.model.forward = lambda *args, **kwargs: plain(*args, **kwargs | {"attention_mask": None})
    install_fused_head(model)
    reason = disagreement(model, rows_of("long prompts"), PreferenceCollator(0), Layout("shared"), nullcontext)
    assert "gives other log-probs in shared rows" in reason


def test_a_reference_pass_of_any_layout_gives_the_same_sums():
    model = attending_model("llama", dtype=torch.float64)
    install_fused_head(model)
    rows = rows_of("all kinds")
    padded, *others = (sequence_logp(model, collated(rows, layout)) for layout in (PADDED, *LAYOUTS))
    for other in others:
        torch.testing.assert_close(other, padded, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("prompt", "lengths", "expected"),
    [
        (20, [100, 100], "padded"),  # nothing to save
        (400, [100, 100], "shared"),
        (2, [100, 10, 30], "packed"),  # no prompt worth sharing, much padding
    ],
)
def test_auto_takes_what_saves_operations_and_asks_the_model_only_then(prompt, lengths, expected, monkeypatch):
    model = attending_model("llama", max_position_embeddings=2048)
    install_fused_head(model)
    asked = []
    real = disagreement
    monkeypatch.setattr("wrpo.layouts.choice.disagreement", lambda *args: (asked.append(args), real(*args))[1])
    row = tiny_rows(1, sources=0, rejected=len(lengths) - 1)[0]
    row |= {"prompt_ids": [3] * prompt, "response_ids": [[4] * length for length in lengths]}
    choice = choose_layout("auto", model, [row] * 4, PreferenceCollator(0), batch_size=4)
    assert choice.layout.name == expected
    assert bool(asked) == (expected != "padded")
    assert "of the operations" in choice.reason


def evaluated(model: nn.Module, rows: list[dict], layout: str, cache_file: Path) -> torch.Tensor:
    """As `wrpo eval` goes through the rows."""
    return torch.cat(response_logps(model, rows, None, batch_size=2, title="policy", layout=layout)).double()


def scored(model: nn.Module, rows: list[dict], layout: str, cache_file: Path) -> torch.Tensor:
    """As `wrpo logp` goes through the rows."""
    how = {"batch_size": 2, "layout": layout, "progress": False}
    sums = summed_logp(Dataset.from_list(rows), model, None, cache_file=cache_file, **how)
    return torch.tensor([logp for row in sums for logp in row], dtype=torch.float64)


def run_counting_tokens(logps_of: Callable, model: nn.Module, *given) -> tuple[torch.Tensor, int]:
    """Log-probs, and the tokens, padding among them, that went through the model on the way."""
    tokens = []
    counting = model.model.layers[0].register_forward_pre_hook(
        lambda _module, args, kwargs: tokens.append((args or (kwargs["hidden_states"],))[0].shape[:2].numel()),
        with_kwargs=True,
    )
    found = logps_of(model, *given)
    counting.remove()
    return found, sum(tokens)


@pytest.mark.parametrize("logps_of", [evaluated, scored])
def test_a_pass_over_rows_takes_the_layout_of_its_setting_and_says_it_once(logps_of, tmp_path, monkeypatch, caplog):
    """Fewer tokens, and the error of padded rows against float64; 9 * 64 ulps as above."""
    rows = rows_of("long prompts")
    exact, model = (attending_model("llama", dtype=dtype) for dtype in (torch.float64, torch.float32))
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    install_fused_head(exact)
    with InFloat64():
        truth = logps(exact.eval(), collated(rows, PADDED)).detach()
    caplog.set_level("INFO", logger="wrpo")
    monkeypatch.setattr("wrpo.layouts.choice.disagreement", lambda *_: None)  # its tokens are none of the pass
    padded, most = run_counting_tokens(logps_of, model, rows, "padded", tmp_path / "padded")
    for layout, chosen in (
        ("packed", "packed, as asked for"),
        ("shared", "shared, as asked for"),
        ("auto", "shared, 0."),
    ):
        caplog.clear()
        got, tokens = run_counting_tokens(logps_of, model, rows, layout, tmp_path / layout)
        assert caplog.text.count("layout: ") == caplog.text.count(f"layout: {chosen}") == 1
        assert tokens < most
        assert (got - truth).abs().max() <= (padded - truth).abs().max() + 9 * 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("logps_of", [evaluated, scored])
def test_a_pass_in_a_layout_that_the_model_cannot_have_is_refused_by_name_alone(logps_of, tmp_path):
    model, rows = attending_model("mamba"), rows_of("long prompts")
    with pytest.raises(ValueError, match=r"layout 'shared': shared rows do not go .* Use layout padded, or auto"):
        logps_of(model, rows, "shared", tmp_path / "shared")
    auto, padded = (logps_of(model, rows, layout, tmp_path / layout) for layout in ("auto", "padded"))
    assert torch.equal(auto, padded)
