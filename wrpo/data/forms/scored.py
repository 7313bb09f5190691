"""Forms that say which response is better by scores of all of them.

The best is the target's, the worst the rejected one; or all others are rejected, each with a share that grows with how
far its score s_j is below the best one's:

    q_j = (s_best - s_j) / sum_k (s_best - s_k)

so that one as good as the best has no share and is left out.
"""

from __future__ import annotations

import math
from typing import Any

from wrpo.data.roles import REJECTED, TARGET
from wrpo.rows.errors import DataError, shown

from .columns import names, numbers
from .conversation import prompt_of
from .response import Reading, Response, unpacked


def generated(row: dict, every: bool) -> Reading:
    """SimPO's pipeline: all_generated_responses, all_rm_scores and, where it is there, response_model_names."""
    texts = row["all_generated_responses"]
    if not (isinstance(texts, list) and texts):
        raise DataError("a list of responses", shown(texts), "Drop the row.", field="all_generated_responses")
    scores = numbers(row["all_rm_scores"], len(texts), "all_rm_scores")
    models = names(row.get("response_model_names"), len(texts), "response_model_names")
    responses = [
        Response(f"all_generated_responses[{k}]", text, TARGET, model=model, reward=score)
        for k, (text, score, model) in enumerate(zip(texts, scores, models, strict=True))
    ]
    return prompt_of(row), by_score(responses, scores, every)


def ranked(row: dict, every: bool) -> Reading:
    """NeMo: `completions` of {rank, completion, reward}, the lowest rank is the best; its prompt may be `context`."""
    completions = row["completions"]
    keys = {"rank", "completion"}
    if not (
        isinstance(completions, list)
        and completions
        and all(isinstance(c, dict) and keys <= c.keys() for c in completions)
    ):
        todo = "Write one object for each completion."
        raise DataError("a list of {rank, completion}", shown(completions), todo, field="completions")
    ranks = numbers([c["rank"] for c in completions], len(completions), "completions.rank")
    rewards = numbers([c.get("reward") for c in completions], len(completions), "completions.reward", may_be_none=True)
    responses = [
        Response(f"completions[{k}]", completion["completion"], TARGET, reward=reward)
        for k, (completion, reward) in enumerate(zip(completions, rewards, strict=True))
    ]
    return _asked(row), by_score(responses, [-rank for rank in ranks], every)


def preferred(row: dict, every: bool) -> Reading:
    """HelpSteer3: response1, response2 and overall_preference, which is below 0 where the first is better."""
    (preference,) = numbers(row["overall_preference"], 1, "overall_preference")
    responses = [Response(name, row[name], TARGET) for name in ("response1", "response2")]
    return _asked(row), by_score(responses, [-preference, 0.0], every)


def _asked(row: dict) -> Any:
    return prompt_of(row) if row.get("context") is None else unpacked(row["context"])


def by_score(responses: list[Response], scores: list[float], every: bool) -> list[Response]:
    """The best response as the target's; the worst, or every other one, as rejected."""
    best = max(range(len(scores)), key=scores.__getitem__)
    below = [scores[best] - score for score in scores]
    if not every:
        worst = max(range(len(below)), key=below.__getitem__)
        below = [gap * (k == worst) for k, gap in enumerate(below)]
    total = math.fsum(below)
    rejected = [
        response._replace(role=REJECTED, share=gap / total)
        for response, gap in zip(responses, below, strict=True)
        if gap > 0
    ]
    return [responses[best]._replace(share=1.0), *rejected]
