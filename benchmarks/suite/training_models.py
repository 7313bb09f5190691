"""The models that `benchmarks.whole_steps` trains, each with rows for it.

    SmolLM2-135M   real weights (V = 49152, D = 576) and the demo's triples: real text, short answers
    Llama          random weights behind a head of today's size (V = 128256, D = 512, tied, 8 layers), random tokens:
                   prompts of 64 to 192, answers of 64 to 256
    Llama-1B       random weights in the shape of Llama-3.2-1B (16 layers, D = 2048), for a GPU; rows as Llama's
    tiny           for tests and `--quick`

Every row brings the log-probs of a reference along, -log(V) / 2 for each token and 10 nats less for each next answer,
so that answers of one length do not cancel. They are as good as any for time and memory, and the loss of the first step
is then one that contestants have to find, not the log 2 of a reference like the model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wrpo.data.roles import ROLES, without

SIZES = {
    "Llama": {"vocab_size": 128256, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
    "Llama-1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "tiny": {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}
HEADS = {"Llama-1B": (32, 8)}  # of attention: queries, keys
SHORT = ((64, 192), (64, 256))  # tokens of prompts and of answers: least, most
LENGTHS = {"Llama": SHORT, "Llama-1B": SHORT, "tiny": ((8, 24), (8, 32))}
NAMES = ("SmolLM2-135M", *SIZES)


class Work(NamedTuple):
    model: nn.Module
    tokenizer: Any
    rows: list[dict]  # tokenised triples with `ref_logp`


def work_of(name: str, count: int, *, pairs: bool, lengths: tuple[int, int] | None = None) -> Work:
    """A model on this machine's device, its tokenizer and `count` rows; pairs are triples without their source.

    lengths: tokens of every prompt and of every answer, then random ones; None: those of the model's own rows.

    Raises:
        UserError: the package with the weights of SmolLM2-135M is not installed.
    """
    if name == "SmolLM2-135M":
        from wrpo.demo.model import load

        model, tokenizer = load()
        model.set_attn_implementation("sdpa")  # as transformers loads it; the demo's short rows are faster with eager
    else:
        model, tokenizer = random_llama(name), padding_only()
    vocabulary = model.config.vocab_size
    if lengths is not None:
        rows = random_rows(count, vocabulary, *((length, length) for length in lengths))
    elif name == "SmolLM2-135M":
        rows = demo_rows(tokenizer, count)
    else:
        rows = random_rows(count, vocabulary, *LENGTHS[name])
    rows = [without(row, "source") for row in rows] if pairs else rows
    return Work(model, tokenizer, [with_reference(row, vocabulary) for row in rows])


def random_llama(name: str) -> nn.Module:
    torch.manual_seed(0)
    queries, keys = HEADS.get(name, (8, 4))
    heads = {"num_attention_heads": queries, "num_key_value_heads": keys, "max_position_embeddings": 8192}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(LlamaConfig(**SIZES[name], **heads, tie_word_embeddings=True, pad_token_id=0))


def padding_only() -> Any:
    """The tokenizer of rows that are token ids already: trainers ask it for the padding token alone."""
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")


def demo_rows(tokenizer: Any, count: int) -> list[dict]:
    from wrpo.data import load_examples, tokenize_examples
    from wrpo.demo.make_triples import shipped_rows

    triples = load_examples(shipped_rows(ties=False))
    order = [k % len(triples) for k in range(count)]
    return list(tokenize_examples(triples.select(order), tokenizer))


def random_rows(count: int, vocabulary: int, prompt: tuple[int, int], answer: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(*prompt),
            "response_ids": [ids(*answer) for _ in ROLES],
            "role": list(ROLES),
            "share": [1.0] * len(ROLES),
        }
        for _ in range(count)
    ]


def with_reference(row: dict, vocabulary: int) -> dict:
    token = -math.log(vocabulary) / 2
    return row | {"ref_logp": [token * len(ids) - 10.0 * place for place, ids in enumerate(row["response_ids"])]}
