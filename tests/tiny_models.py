"""Tiny random language models, one for each way of making logits; tiny data; the fused head beside plain logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from wrpo.data import PreferenceCollator, SFTCollator
from wrpo.head import install_fused_head, run_in_head
from wrpo_kernels import linear_token_logp

VOCABULARY = 97  # a prime: no tile fits
PAD = 0

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # scores of a few nats, so that a softcap or a scale shows
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# family: (config class, what is special about its logits)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma2-softcap": ("Gemma2Config", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}),
    "gemma3-softcap": ("Gemma3TextConfig", {"final_logit_softcapping": 5.0, "head_dim": 8}),
    "cohere-multiplies": ("CohereConfig", {"logit_scale": 0.0625}),
    "granite-divides": ("GraniteConfig", {"logits_scaling": 8.0}),
    "hyperclovax-multiplies": ("HyperCLOVAXConfig", {"logits_scaling": 8.0}),
    "minicpm3-divides-hidden-states": (
        "MiniCPM3Config",
        {
            "dim_model_base": 8,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gpt2-tied-learned-positions": ("GPT2Config", {**_GPT, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
    "phi-bias": ("PhiConfig", {"num_key_value_heads": 4}),
    "gptj-bias": ("GPTJConfig", {**_GPT, "rotary_dim": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """The same weights for the same arguments. Skips the test where this transformers does not know the family."""
    name, special = FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(transformers, name)(**{**_SHAPE, **special, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = model.get_output_embeddings()
        if head.bias is not None:
            nn.init.normal_(head.bias)  # zero at birth, and then nobody would notice that it is missing
    return model


def tiny_rows(count: int = 8, *, sources: int = 1, targets: int = 1, rejected: int = 1, seed: int = 0) -> list[dict]:
    """Tokenised rows with prompts of 2 to 5 tokens and responses of 1 to 9, all of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {"source": sources, "target": targets, "rejected": rejected}

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(2, 5),
            "response_ids": [ids(1, 9) for _ in range(sources + targets + rejected)],
            "role": [role for role, number in numbers.items() for _ in range(number)],
            "share": [1 / number for number in numbers.values() for _ in range(number)],
        }
        for _ in range(count)
    ]


def preference_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return PreferenceCollator(PAD)(rows)


def sft_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return SFTCollator(PAD)(rows)


def plain_logp(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sequence log-probs [S] from the model's own logits, in float64 from there on; differentiable."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    counts = batch["labels"] != -100
    rows = logits.double().log_softmax(-1).gather(-1, batch["labels"].where(counts, 0)[..., None])[..., 0]
    return rows.where(counts, 0.0).sum(1)


# Both sides multiply, add and take logarithms in float32, in another order. A response here has at most 9 tokens, with
# scores below 64 nats: 9 * 64 * eps.
ATOL = 9 * 64 * torch.finfo(torch.float32).eps


def fused_logp(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    def head_fn(hidden, weight, **head):
        return linear_token_logp(hidden, weight, batch["labels"], **head).sum(1)

    return run_in_head(model, head_fn, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def gradients(model: nn.Module, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    cotangent = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
    model.zero_grad()
    (logp * cotangent).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_fused_is_plain(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.eval()
    plain = plain_logp(model, batch)
    expected = gradients(model, plain)
    install_fused_head(model)
    fused = fused_logp(model, batch)
    torch.testing.assert_close(fused.double(), plain, rtol=0, atol=ATOL)
    got = gradients(model, fused)
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        assert scale > 0, f"{name} has no gradient: nothing is compared"
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
