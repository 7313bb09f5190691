"""The columns `source_logp`, the source models' own log-probs of the responses, and `ref_logp`, the reference's.

Each model scores every response of the triples after its prompt, rendered and tokenised its own way:

    source_logp[response][model] = (sum of the log-probs of the response's tokens) / (their number)      nats, <= 0

with the responses in the order of the example: sources, target, rejected. The numbers are made by the same head and
kernels as in training. One model is in memory at a time, and what it gave is kept beside the output: a run that was
stopped goes on with the model it was at. Source: InfiFPO, arXiv:2505.13878, eq. 10.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor

from wrpo.data import PreferenceCollator, tokenize_examples
from wrpo.data.batch import on_device
from wrpo.data.collation import pad_token
from wrpo.data.model_limits import refuse_beyond
from wrpo.head.fused_head import install_fused_head
from wrpo.layouts import in_layout
from wrpo.pretrained import free_memory, load_model, load_tokenizer
from wrpo.settings import ModelSettings, SettingsError
from wrpo.user_error import UserError

from .cache import ReferenceFile
from .fingerprint import model_fingerprint
from .reference import sequence_logp

logger = logging.getLogger("wrpo")


def mean_logp(
    triples: datasets.Dataset,
    model: Any,
    tokenizer: Any,
    *,
    cache_file: Path,
    batch_size: int = 8,
    layout: str = "auto",
    logits_dtype: str | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """For each row, each response's mean log-prob a token under one model, in nats: sources, target, rejected.

    Args:
        triples: what `load_examples` returns.
        model: a causal language model of transformers.
        tokenizer: the model's own.
        cache_file: where the sums are kept, with a fingerprint of rows, model and tokenizer (`wrpo.reference.cache`).
        batch_size: rows in a batch. Default: 8.
        layout: auto, padded, packed or shared, as `wrpo.layouts.choose_layout` takes it. Default: auto.
        logits_dtype: "float32" for logits of a 16-bit head that are not rounded before their softmax. Default: None.
        max_length: most tokens in prompt + one response; a response that is cut is scored as far as it goes. Default:
            None, no limit.
        progress: show a progress bar. Default: True.

    Raises:
        DataError: a row that the model's chat template refuses.  ValueError: a token id or a position that the model
            does not have, where no sums are kept a layout by name that it cannot have, or a log-prob that is not
            finite.
    """
    tokens = tokenize_examples(triples, tokenizer, max_length=max_length, max_prompt_length=None)
    sums = summed_logp(
        tokens,
        model,
        tokenizer,
        cache_file=cache_file,
        batch_size=batch_size,
        layout=layout,
        logits_dtype=logits_dtype,
        progress=progress,
    )
    rows = zip(sums, tokens["response_ids"], strict=True)
    return [[logp / len(ids) for logp, ids in zip(logps, responses, strict=True)] for logps, responses in rows]


def summed_logp(
    tokens: datasets.Dataset,
    model: Any,
    tokenizer: Any,
    *,
    cache_file: Path,
    batch_size: int = 8,
    layout: str = "auto",
    logits_dtype: str | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """For each row, each response's summed log-prob under one model, in nats.

    Args:
        tokens: what `tokenize_examples` returns.

    Other arguments, and errors, are those of `mean_logp`.
    """
    tokens = tokens.remove_columns([name for name in ("ref_logp", "source_logp") if name in tokens.column_names])
    refuse_beyond(tokens, model, tokenizer)
    accelerator = Accelerator()
    model = model.to(accelerator.device).eval()
    head = install_fused_head(model)
    arithmetic = {"dtype": str(model.dtype), "head": str(head)}
    if logits_dtype is not None:
        arithmetic["logits_dtype"] = logits_dtype
    fingerprint = model_fingerprint(model, tokenizer, arithmetic)
    file = ReferenceFile(tokens, cache_file, fingerprint, accelerator)
    sums = file.read()
    if sums is None:
        kind = None if logits_dtype is None else getattr(torch, logits_dtype)
        collator = PreferenceCollator(pad_token(tokenizer, model))
        collate = in_layout(layout, collator, model, tokens, batch_size=batch_size)

        def logp_of(rows: list[dict]) -> Tensor:
            return sequence_logp(model, on_device(collate(rows), accelerator.device), logits_dtype=kind)

        sums = file.compute(logp_of, batch_size=batch_size, progress=progress)
    return file.by_row(sums)


def ref_logp(
    triples: datasets.Dataset,
    settings: ModelSettings,
    cache_file: Path,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    batch_size: int = 8,
    layout: str = "auto",
    logits_dtype: str | None = None,
) -> list[list[float]]:
    """The column `ref_logp` [R]: each response's summed log-prob under the reference model, in nats.

    Args:
        triples: what `load_examples` returns.
        settings: of the reference model, whose tokenizer and template the policy has too.
        cache_file: where the sums are kept.
        max_length, max_prompt_length: as in training, which must see the same tokens.
        batch_size, layout, logits_dtype: as `mean_logp`.

    Raises:
        SettingsError: a model that cannot be loaded, or rows or a layout that it cannot take.
    """
    tokenizer, model = load_tokenizer(settings, "reference"), load_model(settings, "reference")
    tokens = tokenize_examples(triples, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    try:
        options: dict[str, Any] = {"batch_size": batch_size, "layout": layout, "logits_dtype": logits_dtype}
        return summed_logp(tokens, model, tokenizer, cache_file=cache_file, **options)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingsError(f"reference {settings.model_name_or_path!r}: {error}") from error


def with_source_logp(
    triples: datasets.Dataset, models: list[str], cache_dir: Path, *, torch_dtype: Any = "auto", **options: Any
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
        settings = ModelSettings(name, torch_dtype=torch_dtype)
        tokenizer, model = load_tokenizer(settings, "models"), load_model(settings, "models")
        cache_file = cache_dir / f"{number}.safetensors"
        try:
            by_model.append(mean_logp(triples, model, tokenizer, cache_file=cache_file, **options))
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise SettingsError(f"models {name!r}: {error}") from error
        del model
        free_memory()  # before the next model is loaded: one with a fused head is a cycle of references
    by_row = [[list(logp) for logp in zip(*of_models, strict=True)] for of_models in zip(*by_model, strict=True)]
    features = triples.features["source_logp"]
    return triples.remove_columns("source_logp").add_column("source_logp", by_row, feature=features)
