"""A model that vLLM runs in this process: `LLM.generate` on a few hundred requests at a time, their prompts rendered
here as in training, with the engine's own tokenizer.

Written against the interface of vLLM 0.10 and later (https://docs.vllm.ai, offline inference). It has not met vLLM
itself, which needs a GPU: the tests run it with an object of that interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wrpo.data.rendering import Renderer
from wrpo.pretrained import free_memory
from wrpo.user_error import UserError

from .halving import halving
from .local_model import Result
from .prompt_ids import PromptIds
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
        self._prompt_ids: PromptIds | None = None

    def answers(self, requests: list[Request], sampling: Sampling) -> Iterator[Result]:
        """Every request with its reply or the reason why there is none."""
        prompt_ids = self._started()
        rendered, refused = prompt_ids(requests)
        yield from ((request, reason, 0) for request, reason in refused)
        for (_, request), result in halving(rendered, lambda part: self._generate(part, sampling)):
            yield request, result, request.seed(sampling.seed)

    def close(self) -> None:
        """Free the weights, and say what of the prompts was changed."""
        if self._prompt_ids is not None:
            self._prompt_ids.log()
        self._engine = self._prompt_ids = None
        free_memory()

    def _started(self) -> PromptIds:
        if self._prompt_ids is None:
            model = self._source.path or self._source.model
            self._engine = self._vllm.LLM(model=model, **self._source.engine_arguments())
            self._prompt_ids = PromptIds(Renderer(self._engine.get_tokenizer()))
        return self._prompt_ids

    def _generate(self, batch: list[tuple[list[int], Request]], sampling: Sampling) -> list[Reply]:
        """Raises ValueError where one of the prompts is too long."""
        parameters = [self._sampling_params(sampling, request.seed(sampling.seed)) for _, request in batch]
        prompts = [{"prompt_token_ids": ids} for ids, _ in batch]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        return [Reply(output.outputs[0].text, output.outputs[0].finish_reason) for output in outputs]

    def _sampling_params(self, sampling: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, seed=seed
        )
