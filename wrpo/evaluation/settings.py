"""The settings of `wrpo eval`: answers, asked for here or elsewhere, and triples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from wrpo.settings import LAYOUT, REQUIRED, LayoutName, check_choices, check_range, knob, refuse_idle


@dataclass
class EvalSettings:
    """Which answers are compared, and how; which models are asked for them here.

    Raises:
        ValueError: a value out of range, or settings that do not go together.
    """

    output: str = knob(REQUIRED, "Folder of everything that is written.", group="files", aliases=["-o"])
    answers: list[str] = knob([], "Rows of wrpo sample or wrpo score.", group="files")
    export: list[Literal["alpaca-eval", "arena-hard"]] = knob(
        [], "Also write what these benchmarks read.", group="files"
    )
    sources: str | None = knob(
        None, "Which models answer here, as for wrpo sample.", group="asking", metavar="SOURCES.yaml"
    )
    prompts: list[str] = knob([], "Held-out prompts that they are asked.", group="asking")
    samples: int = knob(1, "Answers a prompt and model.", group="asking")
    temperature: float = knob(0.0, "Softmax temperature; 0 is greedy.", group="asking")
    max_tokens: int = knob(2048, "Longest answer, in tokens of the model.", group="asking")
    keep: list[str] = knob([], "Fields of the prompts' rows to carry on.", group="asking", metavar="FIELD")
    baseline: str | None = knob(
        None, "The model that the others must beat. Default: the first in the files.", group="comparison"
    )
    group_by: str | None = knob(
        None, "Field of the rows; each of its values is also reported by itself.", group="comparison", metavar="FIELD"
    )
    solved_at: float | None = knob(
        None, "Reward from which a prompt is solved. Default: 1 with verifier, else none.", group="comparison"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "samples", "max_tokens", low=1)
        check_range(self, "temperature", low=0)
        check_range(self, "solved_at")
        if (self.sources is None) != (not self.prompts):
            raise ValueError("sources and prompts go together: which models, and what they are asked")
        refuse_idle(self, self.sources is not None, "sources", "samples", "temperature", "max_tokens", "keep")
        refuse_idle(self, self.has_answers, "answers", "baseline", "group_by", "solved_at")
        if self.export and not self.has_answers:
            raise ValueError("export needs files of answers, or sources and prompts")

    @property
    def has_answers(self) -> bool:
        return bool(self.answers) or self.sources is not None


@dataclass
class TriplesSettings:
    """Whose implicit reward is compared with whose, on which triples.

    Raises:
        ValueError: a value out of range, or a model that is missing.
    """

    triples: str | None = knob(None, "Held-out triples in either form that wrpo train reads.", group="triples")
    policy: str | None = knob(None, "Folder or hub name of the trained model and its tokenizer.", group="triples")
    reference: str | None = knob(None, "Folder or hub name of the reference model.", group="triples")
    alpha: float = knob(0.1, "Share of the sources in the weighted reward.", group="triples")
    beta: float = knob(0.01, "Scale of the rewards, 1/nats.", group="triples")
    max_length: int = knob(2048, "Most tokens in prompt + one response.", group="triples")
    max_prompt_length: int = knob(1800, "Most tokens in the prompt.", group="triples")
    chat_template_file: str | None = knob(
        None, "Jinja file used instead of the tokenizer's chat template.", group="triples"
    )
    layout: LayoutName = knob("auto", f"{LAYOUT} Each model has its own.", group="triples")
    skip_bad_rows: bool = knob(False, "Leave bad triples out and count them.", group="triples")
    batch_size: int = knob(4, "Triples, or answers for reward_model, at a time.", group="model")
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "Type of the weights in memory; auto: as saved.", group="model"
    )
    trust_remote_code: bool = knob(False, "Run code that a hub repository carries.", group="model")

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "alpha", low=0, high=1)
        check_range(self, "beta", low=0, open_low=True)
        check_range(self, "max_length", low=2)
        check_range(self, "max_prompt_length", "batch_size", low=1)
        of_triples = (field.name for field in dataclasses.fields(self) if field.metadata["group"] == "triples")
        refuse_idle(self, self.triples is not None, "triples", *of_triples)
        if self.triples is not None and None in (self.policy, self.reference):
            raise ValueError("triples needs policy and reference, the model before preference optimisation")
