"""The settings of `wrpo build`: what is chosen, and which files it comes from and goes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wrpo.rows.shards import Shard
from wrpo.settings import REQUIRED, check_choices, check_range, knob, refuse_idle


@dataclass
class BuildSettings:
    """How answers are chosen. The defaults are the paper's (arXiv:2412.03187).

    Rewards and gaps are in units of the candidates' `reward`; lengths in characters or tokens of the response alone.

    Raises:
        ValueError: a value out of range, or a limit in tokens without a tokenizer.
    """

    target: str = knob("target", "Model name of the target's own answers.", group="choice")
    stage: Literal["all", "sft"] = knob(
        "all",
        "sft: the target has not answered yet; write the SFT part, and the other prompts to prompts.jsonl, for the "
        "fine-tuned target to answer. all: SFT part and triples.",
        group="choice",
    )
    sft_share: float = knob(1 / 3, "Share of the prompts that goes to SFT and gives no triple, 0 to 1.", group="choice")
    seed: int = knob(
        42, "Of the hash of the prompt id that decides the part of a prompt and its place in the files.", group="choice"
    )
    num_sources: int = knob(
        1, "Source models kept, the best answer of each; fewer where a prompt has fewer.", group="choice"
    )
    source_rank: int = knob(
        1, "Start from the n-th best source answer instead of the best (the paper's Rank1, Rank2).", group="choice"
    )
    weight_temperature: float | None = knob(
        None, "Weights of the sources kept are softmax(reward / this). Default: equal weights.", group="choice"
    )
    rejected: Literal["target", "source", "same_source"] = knob(
        "target",
        "Whose worst answer is rejected: the target's, that of all sources together, or that of the model which gave "
        "source_chosen.",
        group="choice",
    )
    min_target_gap: float = knob(
        0.0,
        "Least reward(target_chosen) - reward(rejected); below it, or at 0 or less, a prompt gives no triple.",
        group="limits",
    )
    max_target_gap: float | None = knob(None, "Largest reward(target_chosen) - reward(rejected).", group="limits")
    ties: Literal["drop", "source"] = knob(
        "drop",
        "What becomes of a prompt on which the gap between the target's own best and worst answer is 0 or below "
        "min_target_gap. drop: nothing. source: a row without target_chosen, in which the source has the whole weight "
        "from the first step on, if it is better by ties_margin.",
        group="choice",
    )
    ties_margin: float = knob(
        0.5,
        "With ties source, least reward(source_chosen) - reward of the target's best answer, more than 0. The default "
        "is half the range of a verifier that gives 0 to 1: a right answer beside one that is at most half right. Take "
        "less for a reward model whose rewards differ by hundredths.",
        group="choice",
    )
    cut_answers: Literal["drop", "keep"] = knob(
        "drop",
        "What becomes of an answer that a limit of length or a filter has cut, as its finish_reason says. drop: it is "
        "left out, and counted. keep: it is an answer like others, and trains without the end-of-turn token.",
        group="choice",
    )
    scorer: str | None = knob(
        None,
        "Take only rewards of this scorer, as `scorer` in the rows names it. any: take those of all, whose scales you "
        "know to be one. Default: the rows have one scorer.",
        group="choice",
    )
    min_source_gap: float | None = knob(
        None, "Least reward(source_chosen) - reward(rejected). Default: any.", group="limits"
    )
    max_source_gap: float | None = knob(None, "Largest reward(source_chosen) - reward(rejected).", group="limits")
    min_chosen_reward: float | None = knob(
        None, "Least reward of source_chosen and target_chosen, in both parts.", group="limits"
    )
    max_rejected_reward: float | None = knob(None, "Largest reward of rejected.", group="limits")
    min_chars: int = knob(1, "Shortest response, in characters, spaces around it not counted.", group="limits")
    max_chars: int | None = knob(None, "Longest response, in characters.", group="limits")
    max_prompt_chars: int | None = knob(
        None, "Longest prompt, all its messages together, in characters.", group="limits"
    )
    tokenizer: str | None = knob(
        None, "Folder or hub name of the tokenizer that max_tokens counts with.", group="limits"
    )
    max_tokens: int | None = knob(None, "Longest response, in tokens.", group="limits")
    max_prompt_tokens: int | None = knob(None, "Longest prompt, all its messages together, in tokens.", group="limits")
    shard: str | None = knob(
        None,
        "i/n: only the i-th of n equal parts of the prompts, i from 0; n machines together build the whole.",
        group="choice",
    )
    skip_bad_rows: bool = knob(
        False, "Leave bad candidates out and count them, instead of stopping at the first.", group="choice"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "num_sources", "source_rank", "min_chars", "max_chars", "max_prompt_chars", low=1)
        check_range(self, "max_tokens", "max_prompt_tokens", low=1)
        check_range(self, "min_target_gap", "max_target_gap", "min_source_gap", "max_source_gap")
        check_range(self, "min_chosen_reward", "max_rejected_reward")
        check_range(self, "weight_temperature", low=0, open_low=True)
        check_range(self, "seed", low=0, high=2**63 - 1)
        check_range(self, "sft_share", low=0, high=1)
        check_range(self, "ties_margin", low=0, open_low=True)
        if self.ties == "source" and self.rejected != "target":
            raise ValueError(
                f"ties: source needs rejected target, got rejected {self.rejected}. A tied answer of the "
                "target is what is rejected."
            )
        refuse_idle(self, self.ties == "source", "ties source", "ties_margin")
        refuse_idle(self, self.num_sources > 1, "num_sources of 2 or more", "weight_temperature")
        has_limit = self.max_tokens is not None or self.max_prompt_tokens is not None
        refuse_idle(self, has_limit, "max_tokens or max_prompt_tokens", "tokenizer")
        if self.tokenizer is None and (self.max_tokens is not None or self.max_prompt_tokens is not None):
            raise ValueError("tokenizer: expected a folder or hub name, got none. Limits in tokens are counted by it.")
        _in_order(self, "min_target_gap", "max_target_gap")
        _in_order(self, "min_source_gap", "max_source_gap")
        _in_order(self, "min_chars", "max_chars")
        Shard.parse(self.shard)


def _in_order(settings: BuildSettings, low: str, high: str) -> None:
    least, most = getattr(settings, low), getattr(settings, high)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{high}: expected at least {low}, {least:g}, got {most:g}. Nothing could be in between.")


@dataclass
class BuildFiles:
    """Where candidates are read and training data written."""

    candidates: list[str] = knob(
        REQUIRED,
        "Rows of prompt_id, prompt, model, sample, response, reward: .jsonl, .jsonl.gz, .parquet, globs. On the "
        "command line the flag can be left out.",
        group="files",
    )
    output_dir: str = knob(
        REQUIRED,
        "Folder for sft.jsonl, triples.jsonl, report.json and rewards.png.",
        group="files",
        aliases=["-o"],
    )
    format: Literal["jsonl", "parquet"] = knob("jsonl", "Form of the files written.", group="files")
    rows_per_file: int | None = knob(None, "Begin another file after so many rows. Default: one file.", group="files")
    overwrite: bool = knob(False, "Replace what an earlier build left in output_dir.", group="files")
    temp_dir: str | None = knob(
        None,
        "Folder for temporary files, together as large as the unpacked candidates. Default: output_dir.",
        group="files",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "rows_per_file", low=1)
