"""The settings of `wrpo score`: which answers, by which scorer, and how a reward model is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wrpo.rows.shards import Shard
from wrpo.settings import REQUIRED, check_choices, check_range, knob


@dataclass
class ScoreSettings:
    """Which answers are scored, and where they go.

    Raises:
        ValueError: a shard that is none.
    """

    candidates: list[str] = knob(
        REQUIRED, "Answers of wrpo sample: .jsonl, .jsonl.gz, .parquet, globs, or a saved data set.", group="files"
    )
    output: str = knob(REQUIRED, "File that scored answers are appended to, .jsonl.", group="files", aliases=["-o"])
    shard: str | None = knob(
        None, "i/n: only the i-th of n parts of the prompts, i from 0. Default: all.", group="choice"
    )
    skip_bad_rows: bool = knob(False, "Leave bad rows out and count them.", group="choice")

    def __post_init__(self) -> None:
        Shard.parse(self.shard)


@dataclass
class ScorerSettings:
    """Which scorer: one of three, or none.

    Raises:
        ValueError: two scorers, or one without a name, as an unset variable of the shell leaves it.
    """

    reward_model: str | None = knob(
        None, "Folder or hub name of a sequence classification model and its tokenizer.", group="scorer", metavar="PATH"
    )
    judge: str | None = knob(None, "Server, template and scale of a judge.", group="scorer", metavar="JUDGE.yaml")
    verifier: str | None = knob(
        None,
        "A Python function, found from the current folder or installed.",
        group="scorer",
        metavar="MODULE:FUNCTION",
    )

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            if not value.strip():
                raise ValueError(f"{name}: expected a name, got {value!r}")
        if len(given) > 1:
            raise ValueError(f"{', '.join(vars(self))}: expected one of them, got {' and '.join(given)}")

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in vars(self).values())


@dataclass
class RewardModelSettings:
    """How a reward model is run.

    Raises:
        ValueError: a value out of range.
    """

    batch_size: int = knob(8, "Answers scored at a time.", group="reward model")
    max_length: int | None = knob(
        None, "Most tokens of a conversation; a longer one is refused. Default: what the model takes.",
        group="reward model",
    )  # fmt: skip
    label: int | None = knob(
        None, "Which of several numbers is the reward, from 0. Default: the model has one.", group="reward model"
    )
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "Type of the weights in memory; auto: as saved.", group="reward model"
    )
    attn_implementation: str | None = knob(
        None, "Attention of transformers: eager, sdpa, flash_attention_2.", group="reward model"
    )
    chat_template_file: str | None = knob(
        None, "Jinja file used instead of the tokenizer's chat template.", group="reward model"
    )
    trust_remote_code: bool = knob(False, "Run code that a hub repository carries.", group="reward model")

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "batch_size", "max_length", low=1)
        check_range(self, "label", low=0)
