"""A model that vLLM runs in this process: `LLM.chat` on a few hundred requests at a time.

Written against the interface of vLLM 0.10 and later (https://docs.vllm.ai, offline inference). It has not met vLLM
itself, which needs a GPU: the tests run it with an object of that interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wrpo.pretrained import free_memory
from wrpo.user_error import UserError

from .halving import halving
from .local_model import Result
from .prompts import Reply, Request
from .settings import Sampling
from .sources import VllmSource


class VllmModel:
    """`answers(requests, sampling)`; the engine starts at the first call.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, source: VllmSource):
        try:
            import vllm
        except ImportError as error:
            raise UserError(f"{source.model}: needs the package vllm: pip install 'wrpo[vllm]'") from error
        self.window = source.batch_size
        self._vllm, self._source = vllm, source
        self._engine: Any = None

    def answers(self, requests: list[Request], sampling: Sampling) -> Iterator[Result]:
        """Every request with its reply or the reason why there is none."""
        if self._engine is None:
            self._engine = self._vllm.LLM(
                model=self._source.path or self._source.model, **self._source.engine_arguments()
            )
        for request, result in halving(requests, lambda part: self._chat(part, sampling)):
            yield request, result, request.seed(sampling.seed)

    def close(self) -> None:
        """Free the weights."""
        self._engine = None
        free_memory()

    def _chat(self, requests: list[Request], sampling: Sampling) -> list[Reply]:
        """Raises ValueError where one of the prompts is too long, or refused by the chat template."""
        parameters = [self._sampling_params(sampling, request.seed(sampling.seed)) for request in requests]
        outputs = self._engine.chat([request.prompt.messages for request in requests], parameters, use_tqdm=False)
        return [Reply(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]

    def _sampling_params(self, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed
        )
