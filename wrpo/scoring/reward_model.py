"""A sequence classification model as the reward: its one logit for the conversation that ends with the answer.

The conversation is rendered with the model's chat template as in training; where that leaves words out, the answer gets
no reward. Models with code of their own (ArmoRM,
arXiv:2406.12845) may return their reward as `score` instead: it is taken where it is there. Candidates are read in
windows and sorted by length, so that batches hold little padding.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from wrpo.data.model_limits import position_table, refuse_unknown, vocabulary_size
from wrpo.data.rendering import Renderer, log_remarks
from wrpo.pretrained import load_model, load_tokenizer, require_template
from wrpo.rows.errors import DataError
from wrpo.sampling.halving import RowFault, halving
from wrpo.settings import ModelSettings
from wrpo.user_error import UserError

from .candidates import Candidate
from .scoring import Rewards, named_with

logger = logging.getLogger("wrpo")

BATCHES_PER_WINDOW = 16  # a window's
Rendered = tuple[list[int], Candidate]


class RewardModel:
    """Scores in batches, on the GPU if there is one.

    Args:
        settings: model, dtype of the weights, chat template, and whether code of its repository may run.
        batch_size: answers scored at a time.
        max_length: most tokens of a conversation; a longer one is refused, not cut. Default: what the model takes.
        label: which of several logits is the reward. Default: the model has one.

    Raises:
        UserError: nothing to load there, a reward head without trained weights, no chat template, or several labels
            and none chosen.

    Numerics: a reward is that of the answer alone up to rounding, whatever stands beside it in the batch.
    """

    def __init__(
        self, settings: ModelSettings, *, batch_size: int = 8, max_length: int | None = None, label: int | None = None
    ):
        path = settings.model_name_or_path
        self._tokenizer: Any = load_tokenizer(settings, "reward_model")
        require_template(self._tokenizer, f"reward_model {path!r}", may_be_none=False)
        self._renderer = Renderer(self._tokenizer)
        model = load_model(settings, "reward_model", auto=AutoModelForSequenceClassification)
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        config = self._model.config.get_text_config()
        self._vocabulary = vocabulary_size(self._model)
        table = position_table(self._model) or 1 << 30
        self._max_length = min(max_length or getattr(config, "max_position_embeddings", None) or table, table)
        self._label = _label(self._model, label, path)
        self.name = named_with(path, str(self._label), str(self._tokenizer.chat_template))
        pad = self._model.config.pad_token_id
        self._pad = pad if pad is not None and 0 <= pad < self._vocabulary else None
        self._batch_size = batch_size
        if self._pad is None and batch_size > 1:
            logger.warning("%s has no padding token (%s), so answers are scored one at a time", path, pad)
            self._batch_size = 1

    def score(self, candidates: Iterator[Candidate], rewards: Rewards) -> None:
        remarks: Counter[str] = Counter()
        while window := list(islice(candidates, self._batch_size * BATCHES_PER_WINDOW)):
            rendered = []
            for candidate in window:
                try:
                    rendered.append((self._token_ids(candidate, remarks), candidate))
                except DataError as error:
                    rewards.fail(candidate, str(error), is_scorers=False)
            rendered.sort(key=lambda pair: len(pair[0]))
            for start in range(0, len(rendered), self._batch_size):
                for (_, candidate), reward in halving(rendered[start : start + self._batch_size], self._rewards):
                    if isinstance(reward, str):
                        rewards.fail(candidate, reward, is_scorers=not isinstance(reward, RowFault))
                    else:
                        rewards.add(candidate, reward)
        log_remarks(remarks, "answer")

    def _token_ids(self, candidate: Candidate, remarks: Counter[str]) -> list[int]:
        question = candidate.asked
        text, found = self._renderer.conversation(question.messages, candidate.response, **question.beside)
        remarks.update(found)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _rewards(self, batch: list[Rendered]) -> list[float]:
        longest = len(batch[-1][0])
        if longest > self._max_length:
            raise ValueError(f"the conversation has more than {self._max_length} tokens")
        refuse_unknown([tokens for tokens, _ in batch], self._vocabulary, self._tokenizer)
        ids = torch.full((len(batch), longest), self._pad or 0)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        device = self._model.device
        out = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        score = getattr(out, "score", None)
        if score is None:
            score = out.logits[:, self._label]
        return score.float().reshape(len(batch)).tolist()


def _label(model: Any, label: int | None, name: str) -> int:
    count = model.config.num_labels
    if label is None:
        if count > 1 and not gives_its_own_score(model):
            raise UserError(f"{name}: gives {count} numbers an answer; choose one with label, 0 to {count - 1}")
        return 0
    if not 0 <= label < count:
        raise UserError(f"label: expected 0 to {count - 1}, got {label}")
    return label


def gives_its_own_score(model: Any) -> bool:
    """Code of the model's own repository, which may return `score` beside any number of logits."""
    return type(model).__module__.startswith("transformers_modules")
