"""A byte-level tokenizer trained in milliseconds, and chat templates in the styles of three model families."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3: a beginning-of-sequence token, trimmed contents, nothing after the end-of-turn token.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# As Gemma: no system turn of its own, the assistant is called model.
MERGED_SYSTEM = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
# The generation prompt opens a thought that the conversation with the answer does not have.
OPENS_A_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")

SPECIAL = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]
WORDS = ["assistant user system model what is the sum of two and three? five, of course.\n\nhello world 2 + 3 = 5\n"]


def tiny_tokenizer(chat_template: str | None = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """About 330 ids: pad 0, bos 1, end of turn (also eos) 3. Newlines never join with the word behind them."""
    model = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|[^\s\w]?\w+|\s+|[^\s\w]+"), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        WORDS * 2,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def spaced_tokenizer(kind: str, chat_template: str | None = None, *, scheme: str = "first") -> PreTrainedTokenizerFast:
    """As SentencePiece: a text that is tokenised by itself begins with a space; ids of about 300 pieces.

    Args:
        kind: bpe, with words that join across spaces (Llama 2), or unigram (T5).
        scheme: first: the space comes before the first piece alone; always: also behind special tokens.
    """
    is_bpe = kind == "bpe"
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    model = Tokenizer(models.BPE(unk_token="<unk>") if is_bpe else models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=not is_bpe)
    space = decoders.Replace("\u2581", " ")
    model.decoder = decoders.Sequence([space, decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?[]()/_|<>'\"\n+-="
    trainer = trainers.BpeTrainer if is_bpe else trainers.UnigramTrainer
    options = {} if is_bpe else {"unk_token": "<unk>"}
    trained = trainer(vocab_size=300, special_tokens=special, show_progress=False, **options)
    model.train_from_iterator([*WORDS * 3, letters, *letters], trained)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer
