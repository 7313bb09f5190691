"""The models: four sources and the target, of different architectures and tokenizers, each trained here from nothing.

A source practises its own skills most of the time and the others now and then; the target practises all of them alike,
and too little. All of them read a prompt as `prompt <ans> answer <eos>`, in tokens of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from wrpo.data.collation import pad_sequences

from .skills import SKILLS, Task, tasks

SPECIAL = ["<pad>", "<ans>", "<eos>"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ '<ans>' if m.role == 'user' else '<eos>' }}{% endfor %}"
LONGEST = 48  # positions: no prompt with its answer has more characters
MAX_NEW_TOKENS = 20  # the longest right answer has 15 characters


class ModelSpec(NamedTuple):
    """A model to be trained: architecture and tokenizer, own skills, optimizer steps of `BATCH` tasks."""

    architecture: str
    tokenizer: str
    skills: tuple[str, ...]
    steps: int


SOURCES = {
    "mirror": ModelSpec("gpt2", "characters", ("reverse",), 300),
    "puzzle": ModelSpec("llama", "bpe", ("countdown",), 350),
    "order": ModelSpec("qwen2", "digits", ("sort",), 300),
    "measure": ModelSpec("gemma2", "unigram", ("units",), 300),
}
TARGET = ModelSpec("llama", "digits", tuple(SKILLS), 140)
OWN_SHARE = 0.6  # of what a source practises
BATCH = 64
LEARNING_RATE = 3e-3

_WIDTH, _LAYERS, _HEADS = 96, 3, 4
_SHAPE = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}
_GPT2 = {"n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS, "n_positions": LONGEST}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("LlamaConfig", _SHAPE),
    "qwen2": ("Qwen2Config", _SHAPE | {"num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", _SHAPE | {"num_key_value_heads": 2, "head_dim": _WIDTH // _HEADS}),
}


# -- tokenizers -------------------------------------------------------------------------------------------------------


def train_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """characters: one token each; digits: BPE, digits apart; bpe: BPE with whole numbers; unigram: digits apart."""
    digit = "[0-9]" if kind in ("digits", "unigram") else " ?[0-9]+"
    pieces = "." if kind == "characters" else f"{digit}| ?[a-z]+|."
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer: trainers.Trainer
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<pad>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<ans>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def practice(skills: tuple[str, ...], rng: random.Random) -> Iterator[Task]:
    """Training tasks without end: `OWN_SHARE` of them of these skills, the rest of the others.

    Mixed within a batch: with one skill a batch nothing but that skill's commonest words was learnt in 500 steps.
    """
    rest = sorted(set(SKILLS) - set(skills))
    streams = {skill: tasks(skill, "train", rng) for skill in SKILLS}
    while True:
        among = skills if not rest or rng.random() < OWN_SHARE else rest
        yield next(streams[rng.choice(among)])


# -- training from nothing --------------------------------------------------------------------------------------------


def new_model(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> Any:
    name, shape = ARCHITECTURES[spec.architecture]
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape, **ids))


def pretrain(spec: ModelSpec, seed: int, title: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """A trained model and its tokenizer; cross-entropy of the answers' tokens, AdamW, cosine."""
    rng = random.Random(f"{seed} {title}")
    torch.manual_seed(rng.getrandbits(32))
    seen = list(islice(practice(spec.skills, rng), 3000))
    tokenizer = train_tokenizer(spec.tokenizer, [text for task in seen for text in (task.prompt, task.answer)])
    model = new_model(spec, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, spec.steps // 20, spec.steps)
    stream = practice(spec.skills, rng)
    for _ in tqdm(range(spec.steps), desc=f"training {title}", unit="step", mininterval=1.0):
        backward(model, tokenizer, list(islice(stream, BATCH)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def backward(model: Any, tokenizer: PreTrainedTokenizerFast, batch: list[Task]) -> None:
    """Gradients of the mean cross-entropy of the answers' tokens; short and long rows apart, for less padding."""
    prompts = tokenizer([f"{task.prompt}<ans>" for task in batch], add_special_tokens=False)["input_ids"]
    answers = tokenizer([f"{task.answer}<eos>" for task in batch], add_special_tokens=False)["input_ids"]
    pairs = sorted(zip(prompts, answers, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
    count = sum(map(len, answers))
    for part in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
        tensors = pad_sequences(part, tokenizer.pad_token_id)
        inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), reduction="sum")
        (loss / count).backward()
