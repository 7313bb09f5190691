"""wrpo score CANDIDATES ... -o SCORED.jsonl: the rewards of answers, by one of three scorers.

    --reward_model PATH          a sequence classification model with a chat template
    --judge JUDGE.yaml           a model behind an OpenAI-compatible server that is asked for a number
                                 (the end of this help lists the file's fields)
    --verifier module:function   a Python function of (prompt, response), or (prompt, response, row)

CANDIDATES are rows of `wrpo sample`; SCORED gets each of them with `reward` and `scorer`, appended as it comes, in
any order, ready for `wrpo build` and `wrpo eval`. The same command continues where it was stopped or killed. NaN and
infinite rewards are refused, and their rows named. On several machines, give each the same files, --shard i/n and an
output file of its own.

Exit status: 0 every answer has its reward; 3 some have none, said why: the same command tries them again; 2 something
to put right first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Callable

from wrpo.rows.shards import in_shard
from wrpo.settings import ModelSettings, SettingsError, describe_fields, parse_settings, refuse_idle

from .candidates import Candidates
from .judge import Judge, JudgeSource, read_judge
from .scoring import Scorer, score
from .settings import RewardModelSettings, ScorerSettings, ScoreSettings
from .verifier import Verifier


def parse(arguments: list[str]) -> tuple[ScoreSettings, ScorerSettings, RewardModelSettings]:
    """Raises SettingsError also where no scorer is named."""
    settings, scorer, reward_model = parse_settings(
        (ScoreSettings, ScorerSettings, RewardModelSettings),
        arguments,
        "wrpo score",
        __doc__,
        words=("candidates",),
        epilog=f"fields of JUDGE.yaml\n{describe_fields(JudgeSource)}",
    )
    if not scorer.is_given:
        raise SettingsError(f"{', '.join(vars(scorer))}: expected one of them, got none")
    refuse_idle(reward_model, scorer.reward_model is not None, "reward_model", *vars(reward_model))
    return settings, scorer, reward_model


def run(arguments: list[str]) -> int:
    return score_files(*parse(arguments))


def score_files(
    settings: ScoreSettings,
    scorer: ScorerSettings,
    reward_model: RewardModelSettings,
    belongs: Callable[[str, dict], bool] = lambda file, row: True,
) -> int:
    """Score the rows that `belongs(file, row)` lets through, print what became of it, and return the exit status."""
    candidates = Candidates(
        settings.candidates,
        settings.output,
        in_shard=in_shard(settings.shard),
        belongs=belongs,
        skip_bad_rows=settings.skip_bad_rows,
    )
    print(f"{len(candidates):,} answers; {candidates.bad.report()}")
    tally = score(candidates, _scorer(scorer, reward_model), settings.output)
    print(tally.summary())
    print(f"scored  {settings.output}")
    return tally.status


def _scorer(scorer: ScorerSettings, reward_model: RewardModelSettings) -> Scorer:
    if scorer.verifier is not None:
        return Verifier(scorer.verifier)
    if scorer.judge is not None:
        return Judge(read_judge(scorer.judge))
    from .reward_model import RewardModel  # seconds of imports that only this one needs

    assert scorer.reward_model is not None
    settings = ModelSettings(
        model_name_or_path=scorer.reward_model,
        torch_dtype=reward_model.torch_dtype,
        attn_implementation=reward_model.attn_implementation,
        chat_template_file=reward_model.chat_template_file,
        trust_remote_code=reward_model.trust_remote_code,
    )
    return RewardModel(
        settings, batch_size=reward_model.batch_size, max_length=reward_model.max_length, label=reward_model.label
    )
