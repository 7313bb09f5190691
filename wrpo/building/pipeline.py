"""From the first candidate to the last row: read and check, group by prompt, choose, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from wrpo.rows.candidate import checked_candidate, is_known_reason
from wrpo.rows.errors import BadRows, DataError, shown
from wrpo.rows.messages import text_of
from wrpo.rows.reading import read_rows
from wrpo.rows.shards import Shard, place
from wrpo.user_error import UserError

from .answers import Prompt, one_prompt
from .choice import Unusable, choose_sources, preference_row, sft_row
from .grouping import PARTITION_BYTES, PromptGroups, Record
from .limits import WAS_CUT, Limits, distinct
from .picture import draw_rewards
from .report import BuildReport
from .scorers import OF_ANOTHER, Scorers
from .settings import BuildFiles, BuildSettings
from .writing import Output


class Written(NamedTuple):
    """The report, what was written (kind -> path, or glob where there are several files), and how long it took."""

    report: BuildReport
    files: dict[str, Path]
    seconds: float


class Built(NamedTuple):
    """Rows in memory, prompts in the order of their hash, and the report; `triples` holds rows of ties too."""

    triples: list[dict]
    sft: list[dict]
    prompts: list[dict]
    report: BuildReport


def build_rows(candidates: Any, settings: BuildSettings) -> Built:
    """The rows that `build` would write, as lists.

    Args:
        candidates: path, glob or list of paths (`.jsonl`, `.jsonl.gz`, `.parquet`, ...), a `datasets.Dataset`, or a
            list of dicts.
        settings: what is chosen.

    Raises:
        DataError: the first bad candidate, or not a single row.
    """
    rows: dict[str, list[dict]] = {"triples": [], "sft": [], "prompts": []}
    report = BuildReport()
    for kind, row in chosen_rows(candidates, settings, report):
        rows[kind].append(row)
    return Built(**rows, report=report)


def build(settings: BuildSettings, files: BuildFiles, *, partition_bytes: int = PARTITION_BYTES) -> Written:
    """Write the training data; nothing appears in `output_dir` before all of it is written.

    Memory: constant, about three times `partition_bytes` and the answers to one prompt, whatever the number of
    candidates. Temporary files take as much room as the unpacked candidates.

    Raises:
        DataError: the first bad candidate, or not a single row.  UserError: an output that cannot be written, files of
        an earlier build, no such tokenizer.  FileNotFoundError: no such candidates.
    """
    report = BuildReport()
    started = time.perf_counter()
    output = Output(
        Path(files.output_dir), files.format, files.rows_per_file, Shard.parse(settings.shard), files.overwrite
    )
    if files.temp_dir is not None and not Path(files.temp_dir).is_dir():
        raise UserError(f"temp_dir: {files.temp_dir} is no folder. Make it, or leave temp_dir out.")
    try:
        with output:
            temp_dir = output.unfinished if files.temp_dir is None else Path(files.temp_dir)
            for kind, row in chosen_rows(files.candidates, settings, report, temp_dir, partition_bytes):
                output.write(kind, row)
            seconds = time.perf_counter() - started
            record = {"settings": asdict(settings) | asdict(files), "seconds": round(seconds, 1)} | report.as_json()
            output.path("report.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
            draw_rewards(report, output.path("rewards.png"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{error}. Candidates must be readable, and output_dir and temp_dir writable, with room for the rows and "
            "for the unpacked candidates."
        ) from error
    return Written(report, output.files(), seconds)


def chosen_rows(
    candidates: Any,
    settings: BuildSettings,
    report: BuildReport,
    temp_dir: Path | None = None,
    partition_bytes: int = PARTITION_BYTES,
) -> Iterator[tuple[str, dict]]:
    """("sft" | "triples" | "prompts", row), prompts in the order of their hash; the report fills on the way.

    Raises:
        DataError: the first bad candidate, or, after the last, that there was not a single row.
    """
    limits = Limits(settings)
    bad = BadRows(settings.skip_bad_rows)
    with PromptGroups(temp_dir, partition_bytes) as groups:
        for record in _records(candidates, settings, bad, report):
            groups.add(record)
            report.candidates += 1
        with _progress("choosing", total=report.candidates) as bar:
            for group in groups:
                chosen = _chosen(one_prompt(group, bad, report.dropped_answers), settings, limits, report)
                bar.update(len(group))
                if chosen is not None:
                    report.add(*chosen)
                    yield chosen
    report.bad_rows = bad.report()
    if settings.shard is None:  # a shard may be empty
        _refuse_empty(settings, report)


def _records(candidates: Any, settings: BuildSettings, bad: BadRows, report: BuildReport) -> Iterator[Record]:
    """Every good row of the shard and the scorer: order, prompt id, what was asked, and the fields of its `Answer`."""
    shard, scorers = Shard.parse(settings.shard), Scorers(settings.scorer)
    for file, number, row in _progress("reading", read_rows(candidates)):
        try:
            if isinstance(row, DataError):
                raise row
            prompt_id = text_of(row, "prompt_id")
            order, _ = place(prompt_id, settings.seed)
            taken = scorers.takes(row, file, number)  # in all shards, so that all refuse a second scorer
            if shard.holds(order) and taken:
                checked = checked_candidate(row)
                if not is_known_reason(row.get("finish_reason")):
                    report.unknown_reasons[shown(row["finish_reason"])] += 1
                yield order, prompt_id, *checked, file, number
            elif shard.holds(order):
                report.dropped_answers[OF_ANOTHER] += 1
        except DataError as error:
            bad.add(error.at(file, number))


def _progress(what: str, rows: Iterable | None = None, total: int | None = None) -> tqdm:
    return tqdm(rows, total=total, desc=what, unit=" rows", unit_scale=True, delay=1, mininterval=0.5)


def _chosen(
    prompt: Prompt | None, settings: BuildSettings, limits: Limits, report: BuildReport
) -> tuple[str, dict] | None:
    """The part a prompt goes to, and its row; None, and the reason counted, where it gives none."""
    report.prompts += 1
    if prompt is None:
        report.dropped_prompts["two prompts under one prompt_id"] += 1
        return None
    try:
        return _row(prompt, settings, limits, report)
    except Unusable as reason:
        report.dropped_prompts[str(reason)] += 1
        return None


def _row(prompt: Prompt, settings: BuildSettings, limits: Limits, report: BuildReport) -> tuple[str, dict]:
    too_long = limits.refuse_prompt(prompt.asked)
    if too_long:
        raise Unusable(too_long)
    by_target = [answer for answer in prompt.answers if answer.model == settings.target]
    by_sources = [answer for answer in prompt.answers if answer.model != settings.target]
    sources = distinct(limits.keep(by_sources, report.dropped_answers), report.dropped_answers)
    if sources:
        report.won[sources[0].model] += 1
    chosen = choose_sources(sources, settings)
    if place(prompt.prompt_id, settings.seed)[1] < settings.sft_share:
        return "sft", sft_row(prompt, chosen, settings)
    if settings.stage == "sft":
        return "prompts", prompt.fields
    targets = distinct(limits.keep(by_target, report.dropped_answers), report.dropped_answers)
    return "triples", preference_row(prompt, chosen, sources, targets, settings)


def _refuse_empty(settings: BuildSettings, report: BuildReport) -> None:
    cut = "Give wrpo sample more max_tokens, or say --cut_answers keep. " if report.dropped_answers[WAS_CUT] else ""
    if not report.sft + report.preferences + report.unanswered:
        todo = f"{cut}Check the model names, or loosen the limits."
        raise DataError("at least one SFT row or triple", report.summary(), todo)
    if settings.stage == "all" and not report.preferences and report.dropped_prompts:
        todo = f"{cut}Check the name {settings.target!r}, or loosen the limits; before the target has answered: "
        raise DataError("at least one triple", report.summary(), f"{todo}--stage sft.")
