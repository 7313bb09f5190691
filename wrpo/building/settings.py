"""The settings of `wrpo build`: what is chosen, and which files it comes from and goes to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from wrpo.rows.shards import Shard


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BuildSettings:
    """How answers are chosen. The defaults are the paper's (arXiv:2412.03187).

    Rewards and gaps are in units of the candidates' `reward`; lengths in characters or tokens of the response alone.

    Raises:
        ValueError: a value out of range, or a limit in tokens without a tokenizer.
    """

    target: str = _knob("target", "Model name of the target's own answers.")
    stage: Literal["all", "sft"] = _knob(
        "all",
        "sft: the target has not answered yet; write the SFT part, and the other prompts to prompts.jsonl, for the "
        "fine-tuned target to answer. all: SFT part and triples.",
    )
    sft_share: float = _knob(1 / 3, "Share of the prompts that goes to SFT and gives no triple, 0 to 1.")
    seed: int = _knob(42, "Of the hash of the prompt id that decides the part of a prompt and its place in the files.")
    num_sources: int = _knob(1, "Source models kept, the best answer of each; fewer where a prompt has fewer.")
    source_rank: int = _knob(
        1, "Start from the n-th best source answer instead of the best (the paper's Rank1, Rank2)."
    )
    weight_temperature: float | None = _knob(
        None, "Weights of the sources kept are softmax(reward / this). Default: equal weights."
    )
    rejected: Literal["target", "source", "same_source"] = _knob(
        "target",
        "Whose worst answer is rejected: the target's, that of all sources together, or that of the model which gave "
        "source_chosen.",
    )
    min_target_gap: float = _knob(
        0.0, "Least reward(target_chosen) - reward(rejected); below it, or at 0 or less, a prompt gives no triple."
    )
    max_target_gap: float | None = _knob(None, "Largest reward(target_chosen) - reward(rejected).")
    ties: Literal["drop", "source"] = _knob(
        "drop",
        "What becomes of a prompt on which the gap between the target's own best and worst answer is 0 or below "
        "min_target_gap. drop: nothing. source: a row without target_chosen, in which the source has the whole weight "
        "from the first step on, if it is better by ties_margin.",
    )
    ties_margin: float = _knob(
        0.5,
        "With ties source, least reward(source_chosen) - reward of the target's best answer, more than 0. The default "
        "is half the range of a verifier that gives 0 to 1: a right answer beside one that is at most half right. Take "
        "less for a reward model whose rewards differ by hundredths.",
    )
    min_source_gap: float | None = _knob(None, "Least reward(source_chosen) - reward(rejected). Default: any.")
    max_source_gap: float | None = _knob(None, "Largest reward(source_chosen) - reward(rejected).")
    min_chosen_reward: float | None = _knob(None, "Least reward of source_chosen and target_chosen, in both parts.")
    max_rejected_reward: float | None = _knob(None, "Largest reward of rejected.")
    min_chars: int = _knob(1, "Shortest response, in characters, spaces around it not counted.")
    max_chars: int | None = _knob(None, "Longest response, in characters.")
    max_prompt_chars: int | None = _knob(None, "Longest prompt, all its messages together, in characters.")
    tokenizer: str | None = _knob(None, "Folder or hub name of the tokenizer that max_tokens counts with.")
    max_tokens: int | None = _knob(None, "Longest response, in tokens.")
    max_prompt_tokens: int | None = _knob(None, "Longest prompt, all its messages together, in tokens.")
    shard: str | None = _knob(
        None, "i/n: only the i-th of n equal parts of the prompts, i from 0; n machines together build the whole."
    )
    skip_bad_rows: bool = _knob(False, "Leave bad candidates out and count them, instead of stopping at the first.")

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_sources", "source_rank", "min_chars", "max_chars", "max_prompt_chars")
        _at_least(self, 1, "max_tokens", "max_prompt_tokens")
        _finite(self, "min_target_gap", "max_target_gap", "min_source_gap", "max_source_gap")
        _finite(self, "min_chosen_reward", "max_rejected_reward", "weight_temperature", "ties_margin")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}.")
        if not 0 <= self.sft_share <= 1:
            raise ValueError(f"sft_share: expected 0 to 1, got {self.sft_share}.")
        if self.weight_temperature is not None and not self.weight_temperature > 0:
            raise ValueError(
                f"weight_temperature: expected more than 0, got {self.weight_temperature}. None gives equal weights."
            )
        if not self.ties_margin > 0:
            raise ValueError(
                f"ties_margin: expected more than 0, got {self.ties_margin}. A source must be better than a tie."
            )
        if self.ties == "source" and self.rejected != "target":
            raise ValueError(
                f"ties: source needs rejected target, got rejected {self.rejected}. A tied answer of the "
                "target is what is rejected."
            )
        if self.tokenizer is None and (self.max_tokens is not None or self.max_prompt_tokens is not None):
            raise ValueError("tokenizer: expected a folder or hub name, got none. Limits in tokens are counted by it.")
        _in_order(self, "min_target_gap", "max_target_gap")
        _in_order(self, "min_source_gap", "max_source_gap")
        _in_order(self, "min_chars", "max_chars")
        Shard.parse(self.shard)


def _at_least(settings: BuildSettings, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")


def _finite(settings: BuildSettings, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}.")


def _in_order(settings: BuildSettings, low: str, high: str) -> None:
    least, most = getattr(settings, low), getattr(settings, high)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{high}: expected at least {low}, {least:g}, got {most:g}. Nothing could be in between.")


@dataclass
class BuildFiles:
    """Where candidates are read and training data written."""

    candidates: list[str] = field(
        metadata={
            "help": "Rows of prompt_id, prompt, model, sample, response, reward: .jsonl, .jsonl.gz, .parquet, globs. "
            "On the command line the flag can be left out: wrpo build [CONFIG.yaml] CANDIDATES ... -o FOLDER."
        }
    )
    output_dir: str = field(
        metadata={"help": "Folder for sft.jsonl, triples.jsonl, report.json and rewards.png; -o for short."}
    )
    format: Literal["jsonl", "parquet"] = _knob("jsonl", "Form of the files written.")
    rows_per_file: int | None = _knob(None, "Begin another file after so many rows. Default: one file.")
    overwrite: bool = _knob(False, "Replace what an earlier build left in output_dir.")
    temp_dir: str | None = _knob(
        None, "Folder for temporary files, together as large as the unpacked candidates. Default: output_dir."
    )

    def __post_init__(self) -> None:
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ValueError(f"rows_per_file: expected at least 1, got {self.rows_per_file}.")
