"""`wrpo logp TRIPLES ... -o FILE --models MODEL [MODEL ...]`: the column `source_logp`, for `reference_fusion`.

Each model scores every response of the triples after its prompt, rendered and tokenised its own way:

    source_logp[response][model] = (sum of the log-probs of the response's tokens) / (their number)      nats, <= 0

with the responses in the order of the row: sources, target, rejected. The numbers are made by the same head and kernels
as in training. One model is in memory at a time, and what it gave is kept beside the output: a run that was stopped
goes on with the model it was at. Source: InfiFPO, arXiv:2505.13878, eq. 10.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM

from wrpo.data import PreferenceCollator, load_examples, tokenize_examples
from wrpo.data.collation import pad_token
from wrpo.flags import Flags, whole_number
from wrpo.head.fused_head import install_fused_head
from wrpo.pretrained import load_tokenizer
from wrpo.rows.reading import read_rows
from wrpo.settings import ModelSettings, SettingsError
from wrpo.user_error import UserError

from .cache import model_fingerprint, with_reference
from .reference import sequence_logp

logger = logging.getLogger("wrpo")


def mean_logp(
    triples: datasets.Dataset,
    model: Any,
    tokenizer: Any,
    *,
    cache_file: Path,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """For each row, each response's mean log-prob a token under one model, in nats: sources, target, rejected.

    Args:
        triples: what `load_examples` returns.
        model: a causal language model of transformers.
        tokenizer: the model's own.
        cache_file: where the sums are kept, with a fingerprint of rows, model and tokenizer; see `reference_cache`.
        batch_size: rows in a batch. Default: 8.
        max_length: most tokens in prompt + one response; a response that is cut is scored as far as it goes. Default:
            None, no limit.
        progress: show a progress bar. Default: True.

    Raises:
        DataError: a row that the model's chat template refuses.  ValueError: a log-prob that is not finite.
    """
    tokens = tokenize_examples(triples, tokenizer, max_length=max_length, max_prompt_length=None)
    tokens = tokens.remove_columns([name for name in ("ref_logp", "source_logp") if name in tokens.column_names])
    accelerator = Accelerator()
    model = model.to(accelerator.device).eval()
    head = install_fused_head(model)
    collate = PreferenceCollator(pad_token(tokenizer, model))

    def logp_of(rows: list[dict]) -> Tensor:
        return sequence_logp(model, {name: value.to(accelerator.device) for name, value in collate(rows).items()})

    fingerprint = model_fingerprint(model, tokenizer, {"dtype": str(model.dtype), "head": str(head)})
    scored = with_reference(
        tokens, cache_file, fingerprint, logp_of, batch_size=batch_size, accelerator=accelerator, progress=progress
    )
    rows = ((row["ref_logp"], row["response_ids"]) for row in scored)
    return [[logp / len(ids) for logp, ids in zip(logps, responses, strict=True)] for logps, responses in rows]


def with_source_logp(
    triples: datasets.Dataset, models: list[str], cache_dir: Path, *, torch_dtype: str = "auto", **options: Any
) -> datasets.Dataset:
    """The triples with the column `source_logp` [R][M] of all these models, in their order.

    Args:
        triples: what `load_examples` returns.
        models: folders or hub names, each with its tokenizer.
        cache_dir: folder of what each model gave.
        torch_dtype: of the weights in memory. Default: auto, as saved.
        **options: of `mean_logp`.

    Raises:
        SettingsError: a model that cannot be loaded.  Also what `mean_logp` raises.
    """
    by_model = []
    for number, name in enumerate(models):
        logger.info("%s: log-probs of %d rows", name, len(triples))
        tokenizer = load_tokenizer(ModelSettings(model_name_or_path=name), "models")
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
        except (OSError, ValueError) as error:
            raise SettingsError(f"models {name!r}: {error}") from error
        cache_file = cache_dir / f"{number}.safetensors"
        by_model.append(mean_logp(triples, model, tokenizer, cache_file=cache_file, **options))
        del model
        _free()
    by_row = [[list(logp) for logp in zip(*of_models, strict=True)] for of_models in zip(*by_model, strict=True)]
    features = triples.features["source_logp"]
    return triples.remove_columns("source_logp").add_column("source_logp", by_row, feature=features)


def _free() -> None:
    """Before the next model is loaded: one with a fused head is a cycle, which only the collector takes apart."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(arguments: list[str]) -> None:
    flags = Flags("wrpo logp", __doc__)
    flags.add_argument("triples", nargs="+", help="triples: .jsonl, .parquet, or a folder of save_to_disk")
    flags.add_argument("-o", "--output", type=Path, required=True, help="JSON lines file to write")
    flags.add_argument("--models", nargs="+", required=True, help="folders or hub names of the source models")
    flags.add_argument("--batch_size", type=whole_number, default=8, help="rows in a batch (default: 8)")
    flags.add_argument("--max_length", type=whole_number, help="most tokens in prompt + response (default: no limit)")
    flags.add_argument("--torch_dtype", default="auto", help="type of the weights in memory (default: as saved)")
    flags.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    given = flags.read(arguments)
    _refuse_output(given.output, given.overwrite)
    triples = load_examples(given.triples)
    _refuse_input(given.output, triples.unique("file"))
    cache_dir = given.output.with_name(f"{given.output.name}.models")
    scored = with_source_logp(
        triples, given.models, cache_dir, torch_dtype=given.torch_dtype, batch_size=given.batch_size,
        max_length=given.max_length,
    )  # fmt: skip
    if PartialState().is_main_process:  # under torchrun all have the same numbers
        _write(given.output, given.triples, scored)
        print(f"triples  {given.output}")


def _refuse_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".jsonl":
        raise UserError(f"--output: expected a file name ending in .jsonl, got {output.name!r}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise UserError(f"--output: {output} is there already. Name another file, or replace it with --overwrite")


def _refuse_input(output: Path, inputs: list[str]) -> None:
    """An output that could not be finished would have cost the data."""
    if output.exists() and any(Path(name).exists() and output.samefile(name) for name in inputs):
        raise UserError(f"--output: {output} is one of the triples that are read. Name another file")


def _write(output: Path, sources: list[str], scored: datasets.Dataset) -> None:
    """The rows as they were read, fields that no triple has among them, with the column."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    with partial.open("wb") as file:
        for (_, _, row), logp in zip(read_rows(sources), scored["source_logp"], strict=True):
            file.write(_line({**row, "source_logp": logp}))  # type: ignore[dict-item]  # an error has stopped the load
    os.replace(partial, output)


def _line(row: dict) -> bytes:
    text = json.dumps(row, ensure_ascii=False, default=str)  # Parquet has dates
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair in some other field: as an escape it stays readable
        return f"{json.dumps(row, default=str)}\n".encode()
