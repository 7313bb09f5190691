"""The answers that are compared, with their rewards; what `wrpo eval` asks or scores itself, it appends in its folder.

An evaluation that was stopped continues, and never asks twice. The folder's files may hold rows of earlier evaluations
too, of other prompts or models: `asked_here` and `scored_here` tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wrpo.rows.appending import KeySet
from wrpo.sampling.command import sample_files
from wrpo.sampling.prompts import Prompts
from wrpo.sampling.settings import SampleSettings, Sampling
from wrpo.sampling.sources import read_sources
from wrpo.scoring.candidates import Candidate, Candidates, checked
from wrpo.scoring.command import score_files
from wrpo.scoring.settings import RewardModelSettings, ScorerSettings, ScoreSettings
from wrpo.user_error import UserError

from .answers import Answer, read_answers
from .settings import EvalSettings

ANSWERS, SCORED = "answers.jsonl", "scored.jsonl"
Belongs = Callable[[str, dict], bool]  # file, row -> whether this evaluation is about it


def gather(settings: EvalSettings, scorer: ScorerSettings, reward_model: RewardModelSettings) -> list[Answer]:
    """The answers of the files and of the models that are asked here, with the rewards of a scorer that is named here.

    Raises:
        UserError: an answer or a reward could not be had, or what `wrpo sample` and `wrpo score` raise.
    """
    paths: list[str] = [*settings.answers]
    belongs: Belongs = _all_rows
    if settings.sources is not None:
        paths.append(ask(settings, settings.sources))
        belongs = asked_here(paths[-1], settings, settings.sources)
    if scorer.is_given:
        scored = score(paths, settings, scorer, reward_model, belongs)
        paths, belongs = [scored], scored_here(paths, scored, belongs)
    return read_answers(paths, belongs)


def _all_rows(file: str, row: dict) -> bool:
    return True


def ask(settings: EvalSettings, sources: str) -> str:
    """Every model of `sources` on `settings.prompts`; the file of the answers."""
    path = str(Path(settings.output) / ANSWERS)
    fields = sorted({*settings.keep, *([settings.group_by] if settings.group_by else [])})
    drawn = Sampling(samples=settings.samples, temperature=settings.temperature, max_tokens=settings.max_tokens)
    if sample_files(SampleSettings(sources, settings.prompts, path, keep=fields), drawn):
        raise UserError(f"{path}: some answers are missing, said why above; the same command asks for them again")
    return path


def asked_here(path: str, settings: EvalSettings, sources: str) -> Belongs:
    """Of the answers in `path`, those that `settings` ask for; of other files, all."""
    drawn, asked = Sampling(samples=settings.samples), KeySet()
    samples = {source.model: source.sampling(drawn).samples for source in read_sources(sources)}
    for prompt in Prompts(settings.prompts):
        for model, count in samples.items():
            for number in range(count):
                asked.add((prompt.prompt_id, model, number))
    own = Path(path).resolve()

    def belongs(file: str, row: dict) -> bool:
        key = (str(row.get("prompt_id")), str(row.get("model")), row.get("sample", 0))
        return key in asked or Path(file).resolve() != own

    return belongs


def score(
    paths: list[str],
    settings: EvalSettings,
    scorer: ScorerSettings,
    reward_model: RewardModelSettings,
    belongs: Belongs,
) -> str:
    """The answers of `paths` that belong, with their rewards; their file."""
    path = str(Path(settings.output) / SCORED)
    if score_files(ScoreSettings(paths, path), scorer, reward_model, belongs):
        raise UserError(f"{path}: some answers have no reward, said why above; the same command tries them again")
    return path


def scored_here(paths: list[str], scored: str, belongs: Belongs) -> Belongs:
    """Of the answers in `scored`, those of which `paths` hold one that belongs."""
    wanted = KeySet()
    for candidate in Candidates(paths, scored, belongs=belongs):
        wanted.add(candidate.key)
    return lambda file, row: Candidate(checked(row), file).key in wanted
