"""DPO with LoRA in a training loop of your own: python examples/own_loop.py path/to/model pairs.jsonl

The file holds rows {"prompt": "...", "chosen": "...", "rejected": "..."}. docs/own_loop.md explains every step.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrpo import install_fused_head, run_in_head
from wrpo.data import PreferenceCollator, load_examples, tokenize_examples
from wrpo_kernels import linear_dpo_loss, linear_token_logp

folder, file = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
install_fused_head(model)
rows = tokenize_examples(load_examples(file), AutoTokenizer.from_pretrained(folder))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def logp_fn(hidden, weight, **head):  # head: what this model does to its logits (bias, scale, softcap, LoRA)
    return linear_token_logp(hidden, weight, labels, **head).sum(1)


def loss_fn(hidden, weight, **head):
    return linear_dpo_loss(hidden, weight, labels, ref_logp, beta=0.1, **head)


for batch in DataLoader(rows, batch_size=2, shuffle=True, collate_fn=PreferenceCollator(pad_token_id=0)):
    order = batch["role"].argsort(stable=True)  # all chosen answers, then all rejected ones
    input_ids, mask, labels = (batch[name][order].to(device) for name in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad(), model.disable_adapter():  # the reference is the model without its adapter
        ref_logp = run_in_head(model, logp_fn, input_ids=input_ids, attention_mask=mask)
    out = run_in_head(model, loss_fn, input_ids=input_ids, attention_mask=mask)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {out.loss.item():.4f}, margin {out.margin.mean().item():.4f}")
model.save_pretrained("own_loop_adapter")
