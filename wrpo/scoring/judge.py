"""A language model behind an OpenAI-compatible server that is asked for a number.

The judge's YAML file is one entry of kind `server` of `wrpo.sampling.sources`, and with it

    model: judge
    base_url: http://localhost:8000/v1
    template: |                  # {prompt} and {response} stand for them, {lowest} and {highest} for the scale
      ...
    pattern: 'rating: (\\d+)'     # where the number stands in the reply; default: as `verdict` says
    lowest: 1
    highest: 10

A reply that was cut, or that holds no number on the scale or several (`verdict`), is asked for again with another seed,
at a temperature of 0.5 at least.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrpo.rows.appending import hash_of
from wrpo.rows.candidate import is_cut
from wrpo.sampling.prompts import Reply
from wrpo.sampling.settings import Sampling
from wrpo.sampling.sources import ServerSource, check_ready, source_from
from wrpo.settings import SettingsError, knob
from wrpo.settings.yaml_file import read_mapping

from .candidates import Candidate, prompt_text
from .scoring import Rewards, named_with
from .verdict import verdict

logger = logging.getLogger("wrpo")

TEMPLATE = """\
Rate how good the answer below is: correct, helpful, and in the form that was asked for.
{lowest} is useless, {highest} is perfect.

[Prompt]
{prompt}

[Answer]
{response}

[End of the answer]
Give one short reason. Then end with a line "Score: N", N from {lowest} to {highest}."""
PLACES = {"prompt", "response", "lowest", "highest"}
_FILLED = "{prompt}, {response}, {lowest} and {highest}"
_PLACE = re.compile(r"(?<![\w\\}]){([a-z_]+)}")  # not the argument of a macro
OTHER_TEMPERATURE = 0.5  # at 0 the same words would come again


@dataclass
class JudgeSource(ServerSource):
    """The server, and what it is asked."""

    template: str = knob(TEMPLATE, "The message that is sent, with {prompt} and {response}.")
    pattern: str | None = knob(
        None,
        "Regular expression with one group, the number; all that it finds must be the same. Default: a line or "
        "sentence such as 'Score: 7', 'Rating (1-10): 7' or '**Score:** 7/10', or the number alone.",
    )
    lowest: float = knob(1.0, "Least score.")
    highest: float = knob(10.0, "Largest score.")

    def __post_init__(self) -> None:
        self.temperature = 0.0 if self.temperature is None else self.temperature
        super().__post_init__()
        if "{response}" not in self.template:
            raise ValueError("template: expected {response} in it, where the answer goes.")
        if not self.lowest < self.highest:
            raise ValueError(f"highest: expected more than lowest, {self.lowest:g}, got {self.highest:g}.")
        if self.pattern is not None:
            _check_pattern(self.pattern)


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern: not a regular expression: {error}.") from error
    if groups != 1:
        raise ValueError(f"pattern: expected one group, the number, got {groups}.")


def read_judge(path: str | Path) -> JudgeSource:
    """Raises SettingsError: not a mapping, an unknown field, a value out of range, no key or no package to ask with."""
    content = read_mapping(path)
    if content.get("kind", "server") != "server":
        raise SettingsError(f"{path}: kind: a judge is a server, got {content['kind']!r}")
    fields = {name: value for name, value in content.items() if name != "kind"}
    judge: JudgeSource = source_from(JudgeSource, fields, str(path))
    check_ready(judge, str(path))
    return judge


class Judge:
    """Scores by asking; `source.concurrency` candidates at a time."""

    def __init__(self, source: JudgeSource):
        self._source = source
        if strange := sorted({*_PLACE.findall(source.template)} - PLACES):
            names = ", ".join(f"{{{name}}}" for name in strange)
            logger.warning("The judge's template holds %s, which is sent as it is: filled in are %s", names, _FILLED)
        self._sampling = source.sampling(Sampling(max_tokens=1024))
        scale = (source.lowest, source.highest, self._sampling.temperature)
        self.name = named_with(f"judge:{source.model}", source.template, repr(source.pattern), *map(repr, scale))

    def score(self, candidates: Iterator[Candidate], rewards: Rewards) -> None:
        asyncio.run(self._score(candidates, rewards))

    async def _score(self, candidates: Iterator[Candidate], rewards: Rewards) -> None:
        from wrpo.sampling.server import Server

        async with Server(self._source, on_retry=rewards.retry) as server:
            workers = [self._worker(server, candidates, rewards) for _ in range(self._source.concurrency)]
            await asyncio.gather(*workers)

    async def _worker(self, server: Any, candidates: Iterator[Candidate], rewards: Rewards) -> None:
        from wrpo.sampling.server import Failed

        for candidate in candidates:
            try:
                message = {"role": "user", "content": self.question(candidate)}
                reward = await server.ask([message], lambda n, key=candidate.key: self._options(n, key), self.number)
                rewards.add(candidate, reward)
            except Failed as failure:
                misread = failure.fault == "reply" and not rewards.has_any  # by a pattern that fits no reply
                rewards.fail(candidate, str(failure), is_scorers=misread)
            if server.given_up:
                rewards.give_up(server.given_up)
            if rewards.given_up:
                return

    def question(self, candidate: Candidate) -> str:
        """The template, filled in at once: an answer may hold braces of its own."""
        words = {
            "prompt": prompt_text(candidate.asked),
            "response": candidate.response,
            "lowest": f"{self._source.lowest:g}",
            "highest": f"{self._source.highest:g}",
        }
        return re.sub(r"\{(prompt|response|lowest|highest)\}", lambda match: words[match[1]], self._source.template)

    def number(self, reply: Reply) -> float:
        """The number in the reply.

        Raises:
            UnusableReply: none, several, one that is not on the scale, or a reply that was cut.
        """
        from wrpo.sampling.server import UnusableReply

        if is_cut(reply.finish_reason):
            raise UnusableReply(
                f"the judge's reply was cut (finish_reason {reply.finish_reason!r}): if it is too long, give the judge "
                "more max_tokens"
            )
        try:
            return verdict(reply.text, self._source.lowest, self._source.highest, self._source.pattern)
        except ValueError as error:
            raise UnusableReply(str(error)) from None

    def _options(self, unusable: int, key: tuple) -> dict[str, Any]:
        sampling = self._sampling
        return {
            "temperature": max(sampling.temperature, OTHER_TEMPERATURE) if unusable else sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": hash_of((sampling.seed, *key, unusable)) >> 33,
        }
