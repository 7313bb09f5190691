"""Answers of a model, many at a time."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from .models import MAX_NEW_TOKENS

SAMPLES = 5
SEQUENCES = 500  # a batch
HOW = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "num_return_sequences": SAMPLES}  # the paper's


@torch.inference_mode()
def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *, sample: bool, title: str
) -> list[list[str]]:
    """For each prompt the greedy answer, or `SAMPLES` samples; an answer that did not end is the empty text."""
    how = HOW if sample else {"do_sample": False}
    count = SAMPLES if sample else 1
    found: list[list[str]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of like length: less padding
    model.eval()
    with tqdm(total=len(prompts), desc=title, unit="prompt", mininterval=1.0) as bar:
        for start in range(0, len(order), SEQUENCES // count):
            chosen = order[start : start + SEQUENCES // count]
            texts = _generate(model, tokenizer, [prompts[i] for i in chosen], how)
            for place, i in enumerate(chosen):
                found[i] = texts[place * count : (place + 1) * count]
            bar.update(len(chosen))
    return found


def _generate(model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], how: dict[str, Any]) -> list[str]:
    asked = tokenizer([f"{prompt}<ans>" for prompt in prompts], return_tensors="pt", padding=True)
    ids, mask = asked["input_ids"], asked["attention_mask"]
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id, **how
    )[:, ids.shape[1] :]
    ended = (out == tokenizer.eos_token_id).any(1).tolist()
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    return [text.strip() if done else "" for text, done in zip(texts, ended, strict=True)]
