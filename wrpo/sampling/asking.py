"""Every request that is not answered yet, asked once, its answer appended as it comes.

All servers are asked at the same time, each with its own concurrency and rate; then the models that run here, one
after another. An answer is the row

    {"prompt_id", "prompt", "model", "sample", "response", "finish_reason", "seed", "temperature", "top_p",
     "max_tokens", and the prompt's own "tools", "chat_template_kwargs" and kept fields}

in which finish_reason "length" says that the answer was cut at max_tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from wrpo.rows.appending import AppendedRows, KeySet
from wrpo.rows.candidate import is_cut
from wrpo.rows.errors import DataError, shown

from .halving import RowFault
from .prompts import Prompts, Request
from .settings import Sampling
from .sources import LocalSource, ServerSource, Source, VllmSource
from .tally import Tally

DRAWN_WITH = ("temperature", "top_p")  # answers drawn in two ways are not one sample


def sample(prompts: Prompts, sources: list[Source], output: str | Path, sampling: Sampling) -> Tally:
    """Ask every source every prompt, without what `output` already holds.

    Raises:
        UserError: an output file in use, drawn differently or to other prompts of the same ids, a local model that
            cannot be loaded, a full disk.
    """
    settings = {source.model: source.sampling(sampling) for source in sources}
    with AppendedRows(output) as rows:
        answered, counts = _answered(rows, settings, prompts)
        run = _Run(prompts, settings, rows, answered)
        local = [(source, _local_model(source)) for source in sources if not isinstance(source, ServerSource)]
        wanted = {source.model: len(prompts) * settings[source.model].samples for source in sources}
        with Tally(wanted, "answer", run.count_answered(sources) if counts else None) as tally:
            run.tally = tally
            asyncio.run(_ask_servers(run, [source for source in sources if isinstance(source, ServerSource)]))
            for source, model in local:
                _ask_local(run, source, model)
    return tally


class _Run:
    """What all sources share."""

    tally: Tally

    def __init__(self, prompts: Prompts, settings: dict[str, Sampling], rows: AppendedRows, answered: KeySet):
        self.prompts, self.settings, self.rows, self.answered = prompts, settings, rows, answered

    def count_answered(self, sources: list[Source]) -> Counter[str]:
        """How many of the requests are answered, by model: the file may hold answers to other prompts too."""
        wanted = (request for source in sources for request in self._requests(source))
        return Counter(request.model for request in wanted if request.key in self.answered)

    def unanswered(self, source: Source) -> Iterator[Request]:
        return (request for request in self._requests(source) if request.key not in self.answered)

    def _requests(self, source: Source) -> Iterator[Request]:
        for prompt in self.prompts:
            for number in range(self.settings[source.model].samples):
                yield Request(prompt, source.model, number)

    def write(self, request: Request, text: str, finish_reason: str | None, seed: int) -> None:
        sampling = self.settings[request.model]
        self.rows.append(
            {
                "prompt_id": request.prompt.prompt_id,
                "prompt": request.prompt.fields["prompt"],
                "model": request.model,
                "sample": request.sample,
                "response": text,
                "finish_reason": finish_reason,
                "seed": seed,
                **{name: getattr(sampling, name) for name in (*DRAWN_WITH, "max_tokens")},
                **request.prompt.fields,
            }
        )
        self.tally.add(request.model, cut=is_cut(finish_reason))


def _answered(rows: AppendedRows, settings: dict[str, Sampling], prompts: Prompts) -> tuple[KeySet, int]:
    """(keys of the answers that are there, their number)."""
    answered = KeySet()
    for number, row in rows:
        model = row.get("model")
        fields = (row.get("prompt_id"), model, row.get("sample"), row.get("response"))
        if tuple(map(type, fields)) != (str, str, int, str):
            todo = "Name another output file; this one is not of `wrpo sample`."
            raise DataError("an answer", f"fields {sorted(map(str, row))}", todo, file=str(rows.path), row=number)
        for name in DRAWN_WITH:
            if model in settings and row.get(name) not in (None, getattr(settings[model], name)):
                todo = f"Go on with {shown(row[name])}, or name another output file."
                expected = f"answers of {model!r} drawn with {getattr(settings[model], name):g}, as now"
                raise DataError(expected, shown(row[name]), todo, file=str(rows.path), row=number, field=name)
        try:
            if "prompt" in row:
                prompts.refuse_changed(row)
        except DataError as error:
            raise error.at(str(rows.path), number) from None
        answered.add((row["prompt_id"], row["model"], row["sample"]))
    return answered, len(answered)


# -- servers ----------------------------------------------------------------------------------------------------------


async def _ask_servers(run: _Run, sources: list[ServerSource]) -> None:
    await asyncio.gather(*(_ask_server(run, source) for source in sources))


async def _ask_server(run: _Run, source: ServerSource) -> None:
    from .server import Server

    requests = run.unanswered(source)  # shared by the workers: each takes the next
    async with Server(source, on_retry=lambda: run.tally.retry(source.model)) as server:
        workers = [_worker(run, server, requests) for _ in range(source.concurrency)]
        await asyncio.gather(*workers)
        if server.given_up:
            run.tally.give_up(source.model, server.given_up)


async def _worker(run: _Run, server: Any, requests: Iterator[Request]) -> None:
    from .server import Failed

    sampling = run.settings[server.source.model]
    for request in requests:
        seeds: list[int] = []

        def options(unusable: int, request: Request = request, seeds: list[int] = seeds) -> dict[str, Any]:
            seeds.append(request.seed(sampling.seed, unusable))
            return {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": seeds[-1],
            }

        try:
            asked = request.prompt.asked
            reply = await server.ask(asked.messages, options, lambda reply: reply, beside=asked.beside)
            run.write(request, reply.text, reply.finish_reason, seeds[-1])
        except Failed as failure:
            run.tally.fail(request.model, str(failure), request.place)
        if server.given_up:
            break


# -- models that run here ---------------------------------------------------------------------------------------------


def _local_model(source: Source) -> Any:
    if isinstance(source, VllmSource):
        from .vllm_model import VllmModel

        return VllmModel(source)
    assert isinstance(source, LocalSource)
    from .local_model import LocalModel

    return LocalModel(source)


def _ask_local(run: _Run, source: Source, model: Any) -> None:
    sampling = run.settings[source.model]
    in_a_row = 0
    for window in _windows(run.unanswered(source), model.window):
        for request, result, seed in model.answers(window, sampling):
            if isinstance(result, str):
                run.tally.fail(source.model, result, request.place)
                in_a_row += not isinstance(result, RowFault)
            else:
                run.write(request, result.text, result.finish_reason, seed)
                in_a_row = 0
        if in_a_row >= model.window:
            run.tally.give_up(source.model, f"{in_a_row} answers failed in a row")
            break
    model.close()


def _windows(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    requests = iter(requests)
    while window := list(islice(requests, size)):
        yield window
