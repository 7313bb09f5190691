"""Examples to token ids, through `datasets.map`.

Prompt and response are tokenised so that they join as the model sees them: the ids of the whole conversation, cut where
the prompt's own ids end. Where the tokenizer would merge the last character of the prompt with the first of the
response (a response that starts with a newline, say), the response is tokenised alone, because generation starts from
the prompt's ids and can never produce the merged token.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import datasets
from datasets import Features, Value
from datasets.fingerprint import Hasher

from wrpo.rows.errors import BadRows, DataError
from wrpo_kernels import __version__

from . import rendering, truncation
from .rendering import Renderer
from .truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wrpo.data")

_IDS = [Value("int32")]
_TOKENS = {"prompt_ids": _IDS, "response_ids": [_IDS]}
# What each response has, handed on as it is; null where the rows do not have it.
_OF_RESPONSES = {
    "role": [Value("string")],
    "share": [Value("float64")],
    "model": [Value("string")],
    "reward": [Value("float64")],
    "ref_logp": [Value("float64")],
    "source_logp": [[Value("float64")]],
}
# Tokens cut from the prompt and from each response, and why a row is unusable: read for the report, then dropped.
_NOTES = {
    "prompt_cut": Value("int64"),
    "response_cut": [Value("int64")],
    "problem": Value("string"),
    "field": Value("string"),
}


def tokenize_examples(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 2048,
    max_prompt_length: int | None = 1800,
    skip_bad_rows: bool = False,
    chat_template_kwargs: dict | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Token ids of each row's prompt and responses, truncated as `wrpo.data.truncation` says.

    Args:
        dataset: what `load_examples` returns, of either stage.
        tokenizer: a `PreTrainedTokenizerBase`; its chat template is used if it has one.
        max_length: most tokens in prompt + one response; None: no limit. Default: 2048 (the paper's).
        max_prompt_length: most tokens in the prompt; None: no limit of its own. Default: 1800 (the paper's).
        skip_bad_rows: leave out and count rows that the chat template refuses, instead of raising. Default: False.
        chat_template_kwargs: passed on to the chat template; a row's own come on top.
        num_proc: processes; None: this one (fast tokenizers use threads already).

    Returns:
        Dataset of prompt_ids [P], response_ids R x [R_k], role, share, model, reward [R] and, where any row has them,
        ref_logp [R] and source_logp [R][M]; responses end with the end-of-turn token unless they came cut or are cut
        here. Kept on disk in the `datasets` cache under a fingerprint of rows, tokenizer, options and of the code that
        decides the ids.

    Raises:
        DataError: the first bad row, or no good row at all.  ValueError: limits that cannot be met.
    """
    _check_limits(max_length, max_prompt_length)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    fingerprint = _fingerprint(dataset, tokenizer, limits, chat_template_kwargs, skip_bad_rows)
    noted = dataset.map(
        functools.partial(
            _tokenize_batch,
            tokenizer=tokenizer,
            renderer=Renderer(tokenizer, chat_template_kwargs),
            limits=limits | {"bos_token_id": tokenizer.bos_token_id},
            skip_bad_rows=skip_bad_rows,
        ),
        batched=True,
        batch_size=128,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(_TOKENS | _OF_RESPONSES | _NOTES),
        new_fingerprint=fingerprint,
        cache_file_name=_cache_file(fingerprint),
        num_proc=num_proc,
        desc="Tokenising",
    )
    return _without_notes(noted, skip_bad_rows)


def _check_limits(max_length: int | None, max_prompt_length: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length: expected at least 2, got {max_length}. A prompt and a response need a token each."
        )
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length: expected at least 1, got {max_prompt_length}. None means no limit.")


# -- one batch of rows ------------------------------------------------------------------------------------------------


def _tokenize_batch(
    batch: dict,
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    limits: dict,
    skip_bad_rows: bool,
) -> dict:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rendered: list[tuple[str, dict[str, str]] | DataError] = []
    for index, row in zip(indices, rows, strict=True):
        try:
            rendered.append(_rendered(row, renderer))
        except DataError as error:
            placed = error.at(row.get("file", "dataset"), row.get("row", index + 1))
            if not skip_bad_rows:
                raise placed from error
            rendered.append(placed)
    if indices[0] == 0:
        _warn_of_endless_turns(rendered, renderer)
    rendered = [
        texts if isinstance(texts, DataError) else _without_ends_of_cut(row, texts, renderer)
        for row, texts in zip(rows, rendered, strict=True)
    ]
    good = [texts for texts in rendered if not isinstance(texts, DataError)]
    ids = iter(_token_ids(tokenizer, [text for start, whole in good for text in (start, *whole.values())]))
    out = [
        _bad_row(row, texts) if isinstance(texts, DataError) else _good_row(row, texts, ids, tokenizer, limits)
        for row, texts in zip(rows, rendered, strict=True)
    ]
    return {name: [row[name] for row in out] for name in out[0]}


def _rendered(row: dict, renderer: Renderer) -> tuple[str, dict[str, str]]:
    """(prompt text, {response: prompt and response text}) of a row, whose messages are JSON."""
    names = [f"response {number} ({role})" for number, role in enumerate(row["role"], 1)]
    responses = dict(zip(names, map(json.loads, row["responses"]), strict=True))
    tools, options = (json.loads(row.get(name) or "null") for name in ("tools", "chat_template_kwargs"))
    return renderer(json.loads(row["prompt"]), responses, tools=tools, chat_template_kwargs=options)


def _without_ends_of_cut(
    row: dict, texts: tuple[str, dict[str, str]], renderer: Renderer
) -> tuple[str, dict[str, str]]:
    """A response that ends before its model had ended it teaches no end."""
    start, whole = texts
    cuts = row.get("cut") or [False] * len(whole)
    return start, {
        name: renderer.without_end(text) if cut else text for cut, (name, text) in zip(cuts, whole.items(), strict=True)
    }


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of rendered text: special tokens are already written out in it, so none is added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _good_row(
    row: dict,
    texts: tuple[str, dict[str, str]],
    ids: Iterator[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    limits: dict,
) -> dict:
    """The tokenised row; takes the ids of its texts, prompt first, from the iterator."""
    start, whole = texts
    full_prompt = next(ids)
    full = [_response_ids(full_prompt, next(ids), text[len(start) :], tokenizer) for text in whole.values()]
    prompt, responses = truncate(full_prompt, full, **limits)
    out = {"prompt_ids": prompt, "response_ids": responses} | {name: row.get(name) for name in _OF_RESPONSES}
    cuts = [len(a) - len(b) for a, b in zip(full, responses, strict=True)]
    return out | {"prompt_cut": len(full_prompt) - len(prompt), "response_cut": cuts, "problem": None, "field": None}


def _response_ids(prompt: list[int], whole: list[int], response: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return _token_ids(tokenizer, [response])[0]


def _bad_row(row: dict, error: DataError) -> dict:
    empty = dict.fromkeys([*_TOKENS, *_OF_RESPONSES])
    return empty | {"prompt_cut": 0, "response_cut": [], "problem": str(error), "field": error.field}


def _warn_of_endless_turns(rendered: list, renderer: Renderer) -> None:
    texts = next((texts for texts in rendered if not isinstance(texts, DataError)), None)
    if texts and not renderer.ends_its_turns(next(iter(texts[1].values()))):
        logger.warning(
            "The chat template ends a response without a special token: the model cannot learn where to stop."
        )


# -- cache ------------------------------------------------------------------------------------------------------------


def _fingerprint(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *options: object) -> str:
    """Changes whenever the ids could: with rows, vocabulary, template, options, and the code that decides the ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    code = [_source(module) for module in (rendering, truncation, sys.modules[__name__])]
    return Hasher.hash([dataset._fingerprint, vocabulary, special, tokenizer.chat_template, options, code])


def _source(module: ModuleType) -> str:
    """The module's text; the version of the package where it is installed without sources."""
    try:
        return inspect.getsource(module)
    except OSError:
        return __version__


def _cache_file(fingerprint: str) -> str | None:
    """Where the ids are kept; None (memory) where the user has disabled caching in `datasets`."""
    if not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "wrpo"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"tokens-{fingerprint}.arrow")


# -- report -----------------------------------------------------------------------------------------------------------


def _without_notes(noted: datasets.Dataset, skip_bad_rows: bool) -> datasets.Dataset:
    """Report what was cut and skipped, once, and drop the columns that say so."""
    notes = noted.select_columns(list(_NOTES)).with_format("arrow")[:].to_pydict()
    bad = BadRows(skip_bad_rows)
    for field, problem in zip(notes["field"], notes["problem"], strict=True):
        if problem is not None:
            bad.note(field, problem)
    prompts = [cut for cut in notes["prompt_cut"] if cut]
    responses = [cut for cuts in notes["response_cut"] for cut in cuts if cut]
    lost = bool(prompts or responses or bad.count)
    logger.log(
        logging.WARNING if lost else logging.INFO,
        "%d rows tokenised: %d prompts cut by %d tokens, %d of %d responses cut by %d tokens, %s",
        len(noted) - bad.count, len(prompts), sum(prompts), len(responses), sum(map(len, notes["response_cut"])),
        sum(responses), bad.report(),
    )  # fmt: skip
    if bad.count == len(noted):
        raise DataError("at least one usable row", bad.report(), "Look at the first one.")
    absent = [name for name in ("ref_logp", "source_logp") if noted.data.column(name).null_count == len(noted)]
    tokens = noted.remove_columns([*_NOTES, *absent])
    return tokens.select([i for i, problem in enumerate(notes["problem"]) if problem is None]) if bad.count else tokens
