"""examples/own_loop.py: somebody's own training loop with the loss in the model's head."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from wrpo.data import PreferenceCollator, load_examples, tokenize_examples

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "own_loop.py"
PAIRS = [{"prompt": f"What is 2 + {n}?", "chosen": f"It is {n + 2}.", "rejected": "hello world"} for n in range(4)]


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """The lines of a run on four pairs, two a step."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "model", "pairs.jsonl"])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]


def test_a_loop_of_ones_own_trains_an_adapter_and_saves_it(printed):
    losses = [float(re.match(r"loss ([\d.]+), margin", line)[1]) for line in printed]
    assert losses[0] == round(math.log(2), 4)  # the policy is its own reference
    assert losses[1] != losses[0]
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "own_loop_adapter")
    assert any(p.abs().max() > 0 for name, p in adapter.named_parameters() if "lora_B" in name)


def test_the_adapter_has_learnt_to_prefer_the_chosen_answers(printed):
    """By log-probs written out: a loop that took one side for the other would lower its loss all the same."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    batch = PreferenceCollator(0)(list(tokenize_examples(load_examples(PAIRS), tokenizer)))
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "own_loop_adapter")

    def margins() -> torch.Tensor:
        logp = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
        of_label = logp.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        chosen, rejected = of_label.where(labels != -100, 0.0).sum(1).view(-1, 2).T
        return chosen - rejected

    with torch.no_grad(), model.disable_adapter():
        before = margins()
    with torch.no_grad():
        assert (margins() > before).all()
