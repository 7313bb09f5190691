"""wrpo logp ROWS ... -o FILE --models MODEL [MODEL ...]: the column `source_logp`, for `reference_fusion`.

    source_logp[response][model] = (sum of the log-probs of the response's tokens) / (their number)      nats, <= 0

with the responses in the order in which the row holds them, and null for one that weighs nothing.
Each model scores every response of the triples after its prompt, rendered and tokenised its own way. One model is in
memory at a time, and what it gave is kept beside the output: a run that was stopped goes on with the model it was at.

wrpo logp ROWS ... -o FILE --reference MODEL: the column `ref_logp`, which training takes in the place of a reference

    ref_logp[response] = sum of the log-probs of the response's tokens      nats, <= 0

under the model that training starts from, or another one of the same tokenizer, rendered and cut as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from accelerate import PartialState

from wrpo.data import load_examples
from wrpo.data.example import in_order_of_row
from wrpo.rows.json_lines import write_json_lines
from wrpo.rows.reading import read_rows
from wrpo.settings import (
    LAYOUT,
    REQUIRED,
    LayoutName,
    ModelSettings,
    check_choices,
    check_range,
    knob,
    parse_settings,
)
from wrpo.settings.model import check_template
from wrpo.user_error import UserError

from .brought import sums_beside
from .source_logp import ref_logp, with_source_logp

OF_REFERENCE = ("chat_template", "chat_template_file", "max_prompt_length")
OTHER_FORMS = ("ref_chosen_logps", "ref_rejected_logps")  # of the column ref_logp


@dataclass
class LogpSettings:
    """Which triples are scored by which models, and where they go.

    Raises:
        ValueError: a value out of range.
    """

    triples: list[str] = knob(REQUIRED, "Triples: .jsonl, .parquet, or a folder of save_to_disk.", group="files")
    output: str = knob(REQUIRED, "JSON lines file to write.", group="files", aliases=["-o"])
    models: list[str] | None = knob(
        None, "Folders or hub names of the source models, for source_logp.", group="model", metavar="MODEL"
    )
    reference: str | None = knob(
        None, "Instead: folder or hub name of the reference model, for ref_logp.", group="model", metavar="MODEL"
    )
    chat_template: str | None = knob(
        None, "none: prompt and answer as they are. With reference, as in training.", group="model"
    )
    chat_template_file: str | None = knob(
        None, "Jinja file in the place of the reference's chat template, as in training.", group="model"
    )
    overwrite: bool = knob(False, "Replace the output if it is there.", group="files")
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto", "Type of the weights in memory; auto: as saved.", group="model"
    )
    batch_size: int = knob(8, "Rows in a batch.", group="speed")
    layout: LayoutName = knob("auto", f"{LAYOUT} Each model has its own.", group="speed")
    logits_dtype: Literal["float32"] | None = knob(
        None,
        "float32: logits of a 16-bit head are not rounded before their softmax. With reference as in training, or the "
        "log-ratios begin with that rounding. Default: none, the type of the hidden states.",
        group="speed",
    )
    max_length: int | None = knob(
        None,
        "Most tokens in prompt + response. Default: no limit; with reference 2048, as in training.",
        group="data",
    )
    max_prompt_length: int | None = knob(
        None, "Most tokens in the prompt, for reference alone. Default: 1800, as in training.", group="data"
    )
    from_scores: bool = knob(
        False,
        "Rows that score all their answers give all of them, not the best and the worst. As in training.",
        group="data",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, "batch_size", "max_prompt_length", low=1)
        check_range(self, "max_length", low=2)  # a token of the prompt, and one of the response
        check_template(self)
        if (self.models is None) == (self.reference is None):
            got = "neither" if self.models is None else "both"
            raise ValueError(f"models, reference: expected one of the two, got {got}")
        for name in OF_REFERENCE:
            if self.reference is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is for --reference; each source model has its own")
        if self.reference is not None:
            self.max_length, self.max_prompt_length = self.max_length or 2048, self.max_prompt_length or 1800


def parse(arguments: list[str]) -> LogpSettings:
    (settings,) = parse_settings((LogpSettings,), arguments, "wrpo logp", __doc__, words=("triples",))
    return settings


def run(arguments: list[str]) -> None:
    """Score, write the triples with the column, and say where they are."""
    settings = parse(arguments)
    output = Path(settings.output)
    _refuse_output(output, settings.overwrite)
    triples = load_examples(settings.triples, from_scores=settings.from_scores)
    _refuse_input(output, triples.unique("file"))
    name, values = column(settings, triples)
    if PartialState().is_main_process:  # under torchrun all have the same numbers
        _write(output, settings, name, values)
        print(f"triples  {output}")


def column(settings: LogpSettings, triples: datasets.Dataset) -> tuple[str, Any]:
    """Its name, and its value for each row."""
    output = Path(settings.output)
    if settings.reference is None:
        assert settings.models is not None  # the settings saw to it
        scored = with_source_logp(
            triples,
            settings.models,
            output.with_name(f"{output.name}.models"),
            torch_dtype=settings.torch_dtype,
            batch_size=settings.batch_size,
            layout=settings.layout,
            logits_dtype=settings.logits_dtype,
            max_length=settings.max_length,
        )
        return "source_logp", scored["source_logp"]
    model = ModelSettings(
        settings.reference,
        torch_dtype=settings.torch_dtype,
        chat_template=settings.chat_template,
        chat_template_file=settings.chat_template_file,
    )
    return "ref_logp", ref_logp(
        triples,
        model,
        sums_beside(output),
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        batch_size=settings.batch_size,
        layout=settings.layout,
        logits_dtype=settings.logits_dtype,
    )


def _refuse_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".jsonl":
        raise UserError(f"output: expected a file name ending in .jsonl, got {output.name!r}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise UserError(f"output: {output} is there already. Name another file, or replace it with --overwrite")


def _refuse_input(output: Path, inputs: list[str]) -> None:
    """An output that could not be finished would have cost the data."""
    if output.exists() and any(Path(name).exists() and output.samefile(name) for name in inputs):
        raise UserError(f"output: {output} is one of the triples that are read. Name another file")


def _write(output: Path, settings: LogpSettings, name: str, values: Any) -> None:
    """The rows as they were read, fields that no triple has among them, with the column."""
    left_out = OTHER_FORMS if name == "ref_logp" else ()
    rows: Any = (row for _, _, row in read_rows(settings.triples))
    write_json_lines(
        output,
        (
            {field: value for field, value in row.items() if field not in left_out}
            | {name: in_order_of_row(row, of_row, from_scores=settings.from_scores)}
            for row, of_row in zip(rows, values, strict=True)
        ),
    )
