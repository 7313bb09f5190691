"""Token ids of what models that run here are asked, rendered as in training."""

from __future__ import annotations

from collections import Counter

from wrpo.data.continuation import token_ids
from wrpo.data.rendering import Renderer, log_remarks
from wrpo.rows.errors import DataError

from .halving import RowFault
from .prompts import Request


class PromptIds:
    """`prompt_ids(requests)`: (ids and request of each that can be asked, request and reason of each that cannot).

    What the chat template changes in the prompts is counted, once a prompt, for `log`.
    """

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._remarks: Counter[str] = Counter()

    def __call__(
        self, requests: list[Request]
    ) -> tuple[list[tuple[list[int], Request]], list[tuple[Request, RowFault]]]:
        texts, asked, refused = [], [], []
        for request in requests:
            question = request.prompt.asked
            try:
                rendering = self._renderer(question.messages, {}, **question.beside)
            except DataError as error:
                refused.append((request, RowFault(str(error))))
                continue
            texts.append(rendering.prompt)
            asked.append(request)
            if request.sample == 0:
                self._remarks.update(rendering.remarks)
        return list(zip(token_ids(self._renderer.tokenizer, texts), asked, strict=True)), refused

    def log(self) -> None:
        log_remarks(self._remarks, "prompt")
