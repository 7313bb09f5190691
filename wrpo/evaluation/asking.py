"""Answers and rewards that `wrpo eval` has made itself, by the commands `wrpo sample` and `wrpo score`.

Both append to files in the output folder, so an evaluation that was stopped continues, and never asks twice. They
may hold rows of earlier evaluations too, of other prompts or models: `asked_here` and `scored_here` tell them apart.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from wrpo.rows.appending import KeySet
from wrpo.scoring.command import SCORERS
from wrpo.user_error import UserError

ANSWERS, SCORED = "answers.jsonl", "scored.jsonl"
Belongs = Callable[[str, dict], bool]  # file, row -> whether this evaluation is about it


def ask(options: Namespace) -> str:
    """Every model of `options.sources` on `options.prompts`; the file of the answers.

    Raises:
        UserError: an answer could not be had, or what `wrpo sample` raises.
    """
    from wrpo.sampling.command import run

    path = str(options.output / ANSWERS)
    fields = sorted({*options.keep, *([options.group_by] if options.group_by else [])})
    drawn = {"--samples": options.samples, "--temperature": options.temperature, "--max-tokens": options.max_tokens}
    flags = [part for flag, value in drawn.items() for part in (flag, str(value))]
    if run([options.sources, *options.prompts, "-o", path, *flags, *(["--keep", *fields] if fields else [])]):
        raise UserError(f"{path}: some answers are missing, said why above; the same command asks for them again")
    return path


def asked_here(path: str, options: Namespace) -> Belongs:
    """Of the answers in `path`, those that `options` ask for; of other files, all."""
    from wrpo.sampling.prompts import Prompts
    from wrpo.sampling.sources import Sampling, read_sources

    drawn, asked = Sampling(samples=options.samples), KeySet()
    samples = {source.model: source.sampling(drawn).samples for source in read_sources(options.sources)}
    for prompt in Prompts(options.prompts):
        for model, count in samples.items():
            for number in range(count):
                asked.add((prompt.prompt_id, model, number))
    own = Path(path).resolve()

    def belongs(file: str, row: dict) -> bool:
        key = (str(row.get("prompt_id")), str(row.get("model")), row.get("sample", 0))
        return key in asked or Path(file).resolve() != own

    return belongs


def scored_here(paths: list[str], options: Namespace, belongs: Belongs) -> Belongs:
    """Of the scored answers, those to which `paths` hold an answer that belongs."""
    from wrpo.scoring.candidates import Candidate, Candidates, checked

    wanted = KeySet()
    for candidate in Candidates(paths, options.output / SCORED, belongs=belongs):
        wanted.add(candidate.key)
    return lambda file, row: Candidate(checked(row), file).key in wanted


def score(paths: list[str], options: Namespace, belongs: Belongs) -> str:
    """The answers of `paths` that belong, with the rewards of the scorer that `options` names; their file.

    Raises:
        UserError: an answer got no reward, or what `wrpo score` raises.
    """
    from wrpo.scoring.command import run

    path = str(options.output / SCORED)
    (name,) = [name for name in SCORERS if getattr(options, name) is not None]
    flags = [f"--{name.replace('_', '-')}", getattr(options, name)]
    if name == "reward_model":
        flags += ["--torch-dtype", options.torch_dtype, "--batch-size", str(options.batch_size)]
        flags += ["--trust-remote-code"] if options.trust_remote_code else []
    if run([*paths, "-o", path, *flags], belongs):
        raise UserError(f"{path}: some answers have no reward, said why above; the same command tries them again")
    return path
