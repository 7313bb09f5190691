"""Tiny random models of the families whose attention differs, for tests of layouts."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import _SHAPE, FAMILIES
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_STATE = {"state_size": 4, "conv_kernel": 4, "time_step_rank": 4, "expand": 2}

# family: (config class, what it is about); a window of 4 tokens is shorter than the rows of `tiny_rows`.
TAKE_A_MASK = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, **_TYPES}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, **_TYPES}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, **_TYPES}),
    "gemma3-windows-alone": (
        "Gemma3TextConfig",
        {"head_dim": 8, "layer_types": ["sliding_attention"] * 2, "sliding_window": 4},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 4}),
    "phi3-window": ("Phi3Config", {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", {"sliding_window": 4, **_EXPERTS}),
    "gpt2-learned-positions": FAMILIES["gpt2-tied-learned-positions"],
    "granite": FAMILIES["granite-divides"],
    "cohere": FAMILIES["cohere-multiplies"],
    "cohere2": ("Cohere2Config", {**_TYPES, "head_dim": 8}),
    "olmo2": ("Olmo2Config", {}),
}
TAKE_NONE = {
    "mamba": ("MambaConfig", _STATE),
    "bloom-alibi": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "falcon-alibi": ("FalconConfig", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
}


def attending_model(family: str, *, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """The same weights for the same arguments. Skips the test where this transformers does not know the family."""
    name, special = (TAKE_A_MASK | TAKE_NONE)[family]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**_SHAPE, **special, **changes})
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class InFloat64(TorchFunctionMode):
    """What a model casts to float32 on its way, in norms, softmax and positions, is float64 all the same."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})
