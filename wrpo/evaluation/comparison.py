"""What several models' answers to the same prompts are worth: solved prompts, mean scores, and who wins against whom.

A prompt counts once, however many answers it has: its score is the mean over a model's answers, and a model's win over
another there is the mean over all pairs of their answers of

    1 if its answer scores higher, 1/2 if both score the same, else 0

Only prompts that every model has answered are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from wrpo.user_error import UserError

from .intervals import Interval, bootstrap_interval, wilson_interval

Scores = dict[str, dict[str, list[float]]]  # model -> prompt_id -> the scores of its answers
ALL = "all"


@dataclass(frozen=True)
class Worth:
    """One model on some prompts.

    prompts: how many; mean_score: mean over prompts; solved: share of answers that score at least `solved_at`, mean
    over prompts, None where nothing says what solved is.
    """

    prompts: int
    mean_score: float
    solved: float | None
    solved_interval: Interval | None


@dataclass(frozen=True)
class Wins:
    """One model against a baseline on the same prompts.

    win_rate: mean over prompts, ties half, with its Wilson interval; better, worse: prompts whose share of wins is
    above and below 1/2; score_gain: mean over prompts of its score minus the baseline's, with its bootstrap interval,
    None where the prompts are too few for one.
    """

    prompts: int
    win_rate: float
    win_interval: Interval
    better: int
    worse: int
    score_gain: float
    gain_interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """All models on the prompts that all of them answered.

    worth: model -> group -> Worth; wins: model -> group -> Wins, of every model but the baseline; the group `ALL` comes
    first. left_out: prompts that some model answered and another did not.
    """

    baseline: str | None
    worth: dict[str, dict[str, Worth]]
    wins: dict[str, dict[str, Wins]]
    left_out: int

    @property
    def groups(self) -> list[str]:
        return list(next(iter(self.worth.values())))


def compare(
    scores: Scores,
    *,
    baseline: str | None = None,
    groups: dict[str, str] | None = None,
    solved_at: float | None = None,
) -> Comparison:
    """Every model by itself and, where there are several, against the baseline.

    Args:
        scores: model -> prompt_id -> the scores of its answers.
        baseline: a model in `scores`. Default: the first one.
        groups: prompt_id -> its group; each is reported beside `ALL`, in the order of their names. Default: none.
        solved_at: an answer that scores at least this has solved its prompt. Default: nothing says so.

    Raises:
        UserError: no such baseline, or no prompt that all models answered.
    """
    baseline = next(iter(scores)) if baseline is None else baseline
    if baseline not in scores:
        raise UserError(f"baseline: expected one of {', '.join(scores)}, got {baseline!r}")
    prompts = shared_prompts(scores)
    if not prompts:
        raise UserError(f"no prompt that {', '.join(scores)} have all answered: sample them on the same prompts")
    parts = {ALL: prompts}
    for name in sorted({groups[prompt] for prompt in prompts} if groups else ()):
        parts[name] = [prompt for prompt in prompts if groups and groups[prompt] == name]
    others = {model: answered for model, answered in scores.items() if model != baseline}
    return Comparison(
        baseline=baseline if others else None,
        worth={m: {g: worth(s, part, solved_at) for g, part in parts.items()} for m, s in scores.items()},
        wins={m: {g: wins(s, scores[baseline], part) for g, part in parts.items()} for m, s in others.items()},
        left_out=len({prompt for answered in scores.values() for prompt in answered}) - len(prompts),
    )


def shared_prompts(scores: Scores) -> list[str]:
    """The prompts that every model has answered, in the order of the first model."""
    first, *others = scores.values()
    return [prompt_id for prompt_id in first if all(prompt_id in answered for answered in others)]


def worth(answered: dict[str, list[float]], prompts: list[str], solved_at: float | None) -> Worth:
    """What one model's answers to `prompts` (at least one) are worth."""
    mean_score = fmean(fmean(answered[prompt]) for prompt in prompts)
    if solved_at is None:
        return Worth(len(prompts), mean_score, None, None)
    solved = fmean(fmean(score >= solved_at for score in answered[prompt]) for prompt in prompts)
    return Worth(len(prompts), mean_score, solved, wilson_interval(solved, len(prompts)))


def wins(answered: dict[str, list[float]], baseline: dict[str, list[float]], prompts: list[str]) -> Wins:
    """One model against `baseline` on `prompts` (at least one)."""
    won = [_share_won(answered[prompt], baseline[prompt]) for prompt in prompts]
    gains = [fmean(answered[prompt]) - fmean(baseline[prompt]) for prompt in prompts]
    rate = fmean(won)
    return Wins(
        prompts=len(prompts),
        win_rate=rate,
        win_interval=wilson_interval(rate, len(prompts)),
        better=sum(share > 0.5 for share in won),
        worse=sum(share < 0.5 for share in won),
        score_gain=fmean(gains),
        gain_interval=bootstrap_interval(gains),
    )


def _share_won(scores: list[float], others: list[float]) -> float:
    return fmean((score > other) + (score == other) / 2 for score in scores for other in others)
