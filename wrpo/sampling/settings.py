"""The settings of `wrpo sample`: who is asked what, where the answers go, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from wrpo.rows.shards import Shard
from wrpo.settings import REQUIRED, check_range, knob

ROW_FIELDS = ("prompt_id", "prompt", "tools", "chat_template_kwargs", "model", "sample", "response", "reward",
              "finish_reason", "seed", "temperature", "top_p", "max_tokens")  # fmt: skip


@dataclass
class SampleSettings:
    """Who is asked what, and where the answers go.

    Raises:
        ValueError: a shard that is none, or a field to keep that the answers have themselves.
    """

    sources: str = knob(REQUIRED, "Which models answer: a YAML file, see below.", group="files", metavar="SOURCES.yaml")
    prompts: list[str] = knob(
        REQUIRED, "What they are asked: .jsonl, .jsonl.gz, .parquet, globs, or a saved data set.", group="files"
    )
    output: str = knob(REQUIRED, "File that answers are appended to, .jsonl.", group="files", aliases=["-o"])
    model: list[str] = knob([], "Ask only these models of the file. Default: all.", group="choice")
    shard: str | None = knob(
        None, "i/n: only the i-th of n parts of the prompts, i from 0. Default: all.", group="choice"
    )
    keep: list[str] = knob([], "Fields of the prompts' rows to carry on.", group="choice", metavar="FIELD")
    skip_bad_rows: bool = knob(False, "Leave bad prompts out and count them.", group="choice")

    def __post_init__(self) -> None:
        Shard.parse(self.shard)
        for name in self.keep:
            if name in ROW_FIELDS:
                raise ValueError(
                    f"keep: expected a field of the prompts, got {name!r}, which the answers have themselves"
                )


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The defaults are the paper's (arXiv:2412.03187).

    Raises:
        ValueError: a value out of range.
    """

    samples: int = knob(5, "Answers a prompt and model.", group="asking")
    temperature: float = knob(0.8, "Softmax temperature; 0 is greedy.", group="asking")
    top_p: float = knob(0.95, "Nucleus sampling.", group="asking")
    max_tokens: int = knob(2048, "Longest answer, in tokens of the model.", group="asking")
    seed: int = knob(42, "Of the seeds of all answers.", group="asking")

    def __post_init__(self) -> None:
        check_range(self, "samples", "max_tokens", low=1)
        check_range(self, "temperature", low=0)
        check_range(self, "top_p", low=0, high=1, open_low=True)
