"""From one prompt's answers to its SFT row or its row of preferences, or to the reason why there is none."""

from __future__ import annotations

from typing import Any

from wrpo.rows.candidate import Answer
from wrpo.rows.softmax import softmax

from .answers import Prompt
from .settings import BuildSettings


class Unusable(Exception):
    """A prompt gives no row; the message is the reason, as the report counts it."""


def choose_sources(sources: list[Answer], settings: BuildSettings) -> list[Answer]:
    """The best answer of each of the best `num_sources` models, from the answer of rank `source_rank` on.

    Args:
        sources: distinct answers of the source models, best first.

    Raises:
        Unusable: none is left.
    """
    if not sources:
        raise Unusable("no answer of a source model")
    best: dict[str, Answer] = {}
    for answer in sources[settings.source_rank - 1 :]:
        best.setdefault(answer.model, answer)
    if not best:
        raise Unusable(f"no {settings.source_rank} different source answers")
    chosen = [answer for answer in best.values() if _is_good(answer, settings)][: settings.num_sources]
    if not chosen:
        raise Unusable(f"reward of source_chosen below {settings.min_chosen_reward:g}")
    return chosen


def sft_row(prompt: Prompt, chosen: list[Answer], settings: BuildSettings) -> dict[str, Any]:
    """What `wrpo sft` reads: the prompt and the source answers, best first."""
    return _source_columns(prompt, chosen, settings) | _cut(chosen)


def _source_columns(prompt: Prompt, chosen: list[Answer], settings: BuildSettings) -> dict[str, Any]:
    rewards = [answer.reward for answer in chosen]
    return {
        **prompt.fields,
        "source_chosen": [answer.response for answer in chosen],
        "source_model": [answer.model for answer in chosen],
        "source_weight": _weights(rewards, settings.weight_temperature),
        "source_reward": rewards,
    }


def preference_row(
    prompt: Prompt, chosen: list[Answer], sources: list[Answer], targets: list[Answer], settings: BuildSettings
) -> dict[str, Any]:
    """What `wrpo train` reads: a triple or, with `ties` source and the target's answers tied, a row without its best.

    Args:
        chosen: what `choose_sources` returned.
        sources, targets: distinct answers of the source models and of the target, best first.

    Raises:
        Unusable: no answer can be preferred to another.
    """
    if not targets:
        raise Unusable(f"no answer of {settings.target!r}")
    if settings.ties == "source" and _tie(targets, settings):
        return _source_row(prompt, chosen, targets, settings)
    return _triple(prompt, chosen, sources, targets, settings)


def _triple(
    prompt: Prompt, chosen: list[Answer], sources: list[Answer], targets: list[Answer], settings: BuildSettings
) -> dict[str, Any]:
    """The SFT row, and with it the target's best answer and the rejected one."""
    best, rejected = targets[0], _rejected(chosen[0], sources, targets, settings)
    _refuse_target_gap(best, rejected, settings)
    if not _is_good(best, settings):
        raise Unusable(f"reward of target_chosen below {settings.min_chosen_reward:g}")
    return _row_against(rejected, prompt, chosen, best, settings)


def _source_row(prompt: Prompt, chosen: list[Answer], targets: list[Answer], settings: BuildSettings) -> dict[str, Any]:
    """The SFT row of the sources that are better than all of the target's tied answers, and the last of these.

    The last has the highest sample number among equal rewards, whatever its length: to reject the shortest or the
    longest of answers that are worth the same would teach a length.
    """
    best, rejected = targets[0], targets[-1]
    better = [answer for answer in chosen if answer.reward - best.reward >= settings.ties_margin]
    if not better:
        raise Unusable(f"answers of {settings.target!r} tie and no source is better by {settings.ties_margin:g}")
    return _row_against(rejected, prompt, better, None, settings)


def _row_against(
    rejected: Answer, prompt: Prompt, chosen: list[Answer], best: Answer | None, settings: BuildSettings
) -> dict[str, Any]:
    most = settings.max_rejected_reward
    if most is not None and rejected.reward > most:
        raise Unusable(f"reward of rejected above {most:g}")
    preferred = _preferred(chosen, rejected, settings)
    row = _source_columns(prompt, preferred, settings) | {
        "rejected": rejected.response,
        "rejected_reward": rejected.reward,
        "rejected_model": rejected.model,
    }
    if best is None:
        return row | _cut([*preferred, rejected])
    return row | {"target_chosen": best.response, "target_reward": best.reward} | _cut([*preferred, best, rejected])


def _cut(answers: list[Answer]) -> dict[str, list[bool]]:
    """Which responses of a row, sources first, then target, then rejected, are cut; nothing where none is."""
    cut = [answer.cut for answer in answers]
    return {"cut": cut} if any(cut) else {}


def _tie(targets: list[Answer], settings: BuildSettings) -> bool:
    gap = targets[0].reward - targets[-1].reward
    return gap == 0 or gap < settings.min_target_gap


def _rejected(chosen: Answer, sources: list[Answer], targets: list[Answer], settings: BuildSettings) -> Answer:
    if settings.rejected == "target":
        return targets[-1]
    model = chosen.model if settings.rejected == "same_source" else None
    worst = [answer for answer in sources if model in (answer.model, None)][-1]
    if worst is chosen:
        raise Unusable("no second answer of a source to reject")
    return worst


def _refuse_target_gap(best: Answer, rejected: Answer, settings: BuildSettings) -> None:
    gap = best.reward - rejected.reward
    if gap <= 0 and settings.rejected == "target":
        raise Unusable(f"no two answers of {settings.target!r} that differ in reward and text")
    if gap <= 0:
        raise Unusable("target_chosen no better than rejected")
    if best.response.strip() == rejected.response.strip():
        raise Unusable("target_chosen and rejected are one text")
    if gap < settings.min_target_gap:
        raise Unusable(f"target gap below {settings.min_target_gap:g}")
    if settings.max_target_gap is not None and gap > settings.max_target_gap:
        raise Unusable(f"target gap above {settings.max_target_gap:g}")


def _preferred(chosen: list[Answer], rejected: Answer, settings: BuildSettings) -> list[Answer]:
    """The source answers that say something else than the rejected one and keep the gaps to it."""
    others = [answer for answer in chosen if answer.response.strip() != rejected.response.strip()]
    if not others:
        raise Unusable("source_chosen and rejected are one text")
    least, most = settings.min_source_gap, settings.max_source_gap
    near = [answer for answer in others if most is None or answer.reward - rejected.reward <= most]
    if not near:
        raise Unusable(f"source gap above {most:g}")
    kept = [answer for answer in near if least is None or answer.reward - rejected.reward >= least]
    if not kept:
        raise Unusable(f"source gap below {least:g}")
    return kept


def _is_good(answer: Answer, settings: BuildSettings) -> bool:
    return settings.min_chosen_reward is None or answer.reward >= settings.min_chosen_reward


def _weights(rewards: list[float], temperature: float | None) -> list[float]:
    return [1 / len(rewards)] * len(rewards) if temperature is None else softmax(rewards, temperature)
