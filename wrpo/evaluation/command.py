"""wrpo eval [ANSWERS ...] -o FOLDER: what models are worth on prompts and triples that training never saw.

    ANSWERS     rows of `wrpo sample`, of one model or several: solved prompts, mean scores, and each model's wins over
                a baseline. --sources and --prompts ask for them here; --verifier, --reward_model or --judge score them
                here; without a scorer the rewards that `wrpo score` wrote into the rows count
    --triples   held-out triples: how often the policy's implicit reward prefers the chosen answers
    --export    the answers in the files that AlpacaEval 2 and Arena-Hard read

Any of them alone, or together; tables on the screen, eval.json and eval.png in FOLDER. Shares have Wilson intervals and
score gains over ten prompts or more paired bootstrap intervals over the prompts, both at 95 %. Answers that are in
FOLDER already are not asked for again: take another FOLDER, or empty it, when a model has changed.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from wrpo.scoring.settings import RewardModelSettings, ScorerSettings
from wrpo.settings import SettingsError, parse_settings, refuse_idle
from wrpo.user_error import UserError

from .answers import Answer, groups_of, scores_of
from .benchmark_files import write_alpaca_eval, write_arena_hard
from .comparison import Comparison, compare
from .gathering import gather
from .report import answers_table, triples_table, write_json
from .settings import EvalSettings, TriplesSettings

WRITERS: dict[str, Any] = {"alpaca-eval": write_alpaca_eval, "arena-hard": write_arena_hard}


def parse(arguments: list[str]) -> tuple[EvalSettings, ScorerSettings, TriplesSettings]:
    """Raises SettingsError also where there is nothing to evaluate."""
    settings, scorer, triples = parse_settings(
        (EvalSettings, ScorerSettings, TriplesSettings), arguments, "wrpo eval", __doc__, words=("answers",)
    )
    if not settings.has_answers and triples.triples is None:
        raise SettingsError(
            "nothing to evaluate: name files of answers, sources with prompts, or triples with policy and reference"
        )
    refuse_idle(scorer, settings.has_answers, "answers, or sources and prompts", *vars(scorer))
    runs_a_model = triples.triples is not None or scorer.reward_model is not None
    refuse_idle(triples, runs_a_model, "triples or reward_model", "batch_size", "torch_dtype", "trust_remote_code")
    if scorer.verifier and settings.solved_at is None:
        settings.solved_at = 1.0
    return settings, scorer, triples


def run(arguments: list[str]) -> None:
    """Evaluate, print the tables, write the files, say where they are."""
    settings, scorer, triples = parse(arguments)
    folder = Path(settings.output)
    _make_folder(folder)
    written = {"numbers": folder / "eval.json"}
    comparison, accuracies = None, None
    if settings.has_answers:
        answers = gather(settings, scorer, _reward_model_settings(triples))
        written |= export(answers, settings)
        comparison = compare_answers(answers, settings)
    if triples.triples is not None:
        from .implicit_reward import accuracy_of_models  # torch, which tables of answers do without

        accuracies = accuracy_of_models(triples)
    if comparison is not None:
        print(f"\n{answers_table(comparison)}\n{_left_out(comparison)}")
    if accuracies is not None:
        print(f"\n{triples_table(accuracies)}\n")
    write_json(written["numbers"], asdict(settings) | asdict(scorer) | asdict(triples), comparison, accuracies)
    if comparison is not None or accuracies is not None:
        from .picture import draw

        written["picture"] = folder / "eval.png"
        draw(written["picture"], comparison, accuracies)
    for what, path in written.items():
        print(f"{what:<11} {path}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"output: expected a folder, got the file {path}. Name another.") from None
    except OSError as error:
        raise UserError(f"output: the folder {path} cannot be made: {error.strerror}. Name another.") from error


def _reward_model_settings(settings: TriplesSettings) -> RewardModelSettings:
    return RewardModelSettings(
        batch_size=settings.batch_size,
        torch_dtype=settings.torch_dtype,
        trust_remote_code=settings.trust_remote_code,
    )


def _left_out(comparison: Comparison) -> str:
    count = comparison.left_out
    return f"left out: {count} prompts that not every model answered\n" if count else ""


def export(answers: list[Answer], settings: EvalSettings) -> dict[str, Path]:
    """Writes the benchmarks' files; what was written, and in which folder."""
    folders: dict[str, Path] = {name: Path(settings.output) / name.replace("-", "_") for name in settings.export}
    for name, folder in folders.items():
        WRITERS[name](answers, folder)
    return folders


def compare_answers(answers: list[Answer], settings: EvalSettings) -> Comparison | None:
    """The comparison of the models; None where nothing but an export was asked and the answers have no rewards."""
    if settings.export and all(answer.reward is None for answer in answers):
        return None
    groups = groups_of(answers, settings.group_by) if settings.group_by else None
    return compare(scores_of(answers), baseline=settings.baseline, groups=groups, solved_at=settings.solved_at)
