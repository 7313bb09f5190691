"""A model that transformers runs in this process.

Requests are rendered with the chat template, put into batches of like length with the padding on the left, and
answered by `generate`. A batch that does not fit into memory, or fails otherwise, is halved until single requests fail
alone. Whatever the model says is an answer, also nothing: at a temperature the empty answer is one of its answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from wrpo.data.continuation import continued_text
from wrpo.data.model_limits import keep_padding_inside, position_table, refuse_unknown, vocabulary_size
from wrpo.data.rendering import Renderer
from wrpo.pretrained import free_memory, load_model, load_tokenizer, require_template
from wrpo.settings import ModelSettings
from wrpo.training.generation import end_tokens, without_unusable

from .halving import halving
from .prompt_ids import PromptIds
from .prompts import Reply, Request
from .settings import Sampling
from .sources import LocalSource

logger = logging.getLogger("wrpo")

# Fields of a generation_config that draw nothing, or are taken over, or are set by us.
NOT_DRAWN = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "do_sample",
             "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"}  # fmt: skip
BATCHES_PER_WINDOW = 16  # a window's: sorted by length, so that batches hold little padding
Result = tuple[Request, "Reply | str", int]  # request, its reply or why there is none, the seed of its batch


class LocalModel:
    """`answers(requests, sampling)`; the weights are loaded at the first call.

    Raises:
        SettingsError: no tokenizer, or one without a chat template, or no model.
    """

    def __init__(self, source: LocalSource):
        self.window = source.batch_size * BATCHES_PER_WINDOW
        self._batch_size = source.batch_size
        self._settings = ModelSettings(
            model_name_or_path=source.path or source.model,
            gguf_file=source.gguf_file,
            torch_dtype=source.torch_dtype,
            attn_implementation=source.attn_implementation,
            chat_template=source.chat_template,
            chat_template_file=source.chat_template_file,
            trust_remote_code=source.trust_remote_code,
        )
        self._name, self._field = source.model, "path" if source.path else "model"
        self._tokenizer: Any = load_tokenizer(self._settings, self._field)
        require_template(self._tokenizer, source.model, may_be_none=True)
        self._prompt_ids = PromptIds(Renderer(self._tokenizer))
        self._model: Any = None

    def answers(self, requests: list[Request], sampling: Sampling) -> Iterator[Result]:
        """Every request with its reply or the reason why there is none, in the order of their lengths."""
        self._load(sampling)
        rendered, refused = self._prompt_ids(requests)
        yield from ((request, reason, 0) for request, reason in refused)
        rendered.sort(key=lambda pair: len(pair[0]))
        for start in range(0, len(rendered), self._batch_size):
            batch = rendered[start : start + self._batch_size]
            for (_, request), result in halving(batch, lambda part: self._answer_batch(part, sampling)):
                yield (request, result, 0) if isinstance(result, str) else (request, *result)

    def close(self) -> None:
        """Free the weights, and say what of the prompts was changed."""
        self._prompt_ids.log()
        self._model = None
        free_memory()

    def _load(self, sampling: Sampling) -> None:
        if self._model is None:
            model = load_model(self._settings, self._field).eval()
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
            keep_padding_inside(self._tokenizer, model)
            limits = (position_table(model), getattr(model.config.get_text_config(), "max_position_embeddings", None))
            self._vocabulary = vocabulary_size(model)
            self._context = min((limit for limit in limits if limit), default=1 << 30)
            self._settle_generation(sampling)

    def _settle_generation(self, sampling: Sampling) -> None:
        """What the checkpoint brings along are its end tokens; the rest of its settings would act unseen."""
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        carried, unusable = without_unusable(base.generation_config, self._vocabulary)
        if unusable:
            logger.warning("%s: its generation_config holds what cannot be used: %s", self._name, unusable)
        self._end_ids = sorted({*end_tokens(carried), *end_of_turn(self._tokenizer)})
        base.generation_config = self._model.generation_config = GenerationConfig()
        names = zip(self._end_ids, self._tokenizer.convert_ids_to_tokens(self._end_ids), strict=True)
        ends = ", ".join(f"the id {number}" if name is None else repr(name) for number, name in names)
        logger.info(
            "%s: %s on %s, temperature %g, top_p %g, at most %d tokens, ending at %s",
            self._name, str(self._model.dtype).removeprefix("torch."), self._model.device, sampling.temperature,
            sampling.top_p, sampling.max_tokens, ends or "nothing",
        )  # fmt: skip
        others = {name: value for name, value in carried.to_diff_dict().items() if name not in NOT_DRAWN and value}
        if others:
            named = ", ".join(f"{name} {value}" for name, value in others.items())
            logger.warning("%s: its generation_config holds more, which is not used here: %s", self._name, named)

    def _answer_batch(self, batch: list[tuple[list[int], Request]], sampling: Sampling) -> list[tuple[Reply, int]]:
        seed = batch[0][1].seed(sampling.seed)
        longest = len(batch[-1][0])
        if longest >= self._context:
            raise ValueError(f"the prompt has {longest} tokens, and the model takes {self._context}")
        refuse_unknown([ids for ids, _ in batch], self._vocabulary, self._tokenizer)
        return [(reply, seed) for reply in self._generate([ids for ids, _ in batch], sampling, seed)]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Reply]:
        device = self._model.device
        padded = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        width = padded["input_ids"].shape[1]
        torch.manual_seed(seed)
        out = self._model.generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            generation_config=GenerationConfig(
                max_new_tokens=min(sampling.max_tokens, self._context - width),
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=self._end_ids or None,
                **_generation_options(sampling),
            ),
        )
        new = out[:, width:]
        finished = torch.isin(new, torch.tensor(self._end_ids, device=device)).any(1).tolist()
        texts = [continued_text(self._tokenizer, *pair) for pair in zip(prompts, new.tolist(), strict=True)]
        return [Reply(text, "stop" if end else "length") for text, end in zip(texts, finished, strict=True)]


def _generation_options(sampling: Sampling) -> dict[str, Any]:
    """Temperature and top-p alone; transformers adds a top-k of its own unless told not to."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def end_of_turn(tokenizer: Any) -> list[int]:
    """The tokenizer's own end, and the special token behind an answer in its chat template, after which it has none."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
    except Exception:  # a template raises what it likes, of turns that are not to its liking too
        return ends
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    last = tokenizer(text, add_special_tokens=False)["input_ids"][-1:]
    return [*ends, *(token for token in last if token in special)]
