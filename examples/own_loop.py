"""DPO with LoRA in a training loop of your own. docs/own_loop.md explains every step.

    python examples/own_loop.py path/to/model pairs.jsonl

The rows of the file: {"prompt": "...", "chosen": "...", "rejected": "..."}. Leaves the adapter in own_loop_adapter/.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrpo import install_fused_head, run_in_head
from wrpo.data import load_examples, tokenize_examples
from wrpo_kernels import linear_dpo_loss, linear_token_logp


def to_batch(rows):
    """All chosen answers, then all rejected ones: input_ids, attention_mask and labels, each [2B, T]."""
    pairs = [(row["prompt_ids"], row["response_ids"][place]) for place in (0, -1) for row in rows]
    ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in pairs]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask, pad(labels[:, 1:], (0, 1), value=-100)  # each predicts the next


def dpo_step(model, input_ids, mask, labels):
    """The loss of one batch against the model without its adapter."""

    def logp(hidden, weight, **head):  # head: what this model does to its logits (bias, scale, softcap, LoRA)
        return linear_token_logp(hidden, weight, labels, **head).sum(1)  # [2B]

    with torch.no_grad(), model.disable_adapter():
        ref_logp = run_in_head(model, logp, input_ids=input_ids, attention_mask=mask)

    def loss(hidden, weight, **head):
        return linear_dpo_loss(hidden, weight, labels, ref_logp, beta=0.1, **head)

    return run_in_head(model, loss, input_ids=input_ids, attention_mask=mask)


def main(folder, file):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    install_fused_head(model)
    rows = tokenize_examples(load_examples(file), AutoTokenizer.from_pretrained(folder))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for batch in DataLoader(rows, batch_size=2, shuffle=True, collate_fn=to_batch):
        out = dpo_step(model, *batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {out.loss.item():.4f}, margin {out.margin.mean().item():.4f}")
    model.save_pretrained("own_loop_adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
