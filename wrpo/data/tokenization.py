"""Examples to token ids, through `datasets.map`: rendered, tokenised, cut; what was changed on the way is counted."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
from datasets import Features, Value
from datasets.fingerprint import Hasher

from wrpo.rows.errors import BadRows, DataError
from wrpo_kernels import __version__

from . import call_arguments, chat_template, continuation, control_tokens, left_out, rendering, truncation
from .continuation import response_ids, token_ids
from .loading import FEATURES
from .rendering import Renderer, Rendering, log_remarks
from .roles import REJECTED
from .truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wrpo.data")
T = TypeVar("T")

CONTRARY = "a rejected response with a higher reward than a preferred one: the row's own order holds"
ENDLESS = "a response that came cut: it is trained without an end of turn"
SAME_TEXT = "rejected response that is the same as a preferred one: it teaches nothing"

_IDS = [Value("int32")]
_TOKENS = {"prompt_ids": _IDS, "response_ids": [_IDS]}
# What each response has, handed on as it is; null where the rows do not have it.
_OF_RESPONSES = {name: FEATURES[name] for name in ("role", "share", "model", "reward", "ref_logp", "source_logp")}
# Tokens cut from the prompt and from each response, what else was changed, and why a row is unusable: read for the
# report, then dropped.
_NOTES = {
    "prompt_cut": Value("int64"),
    "response_cut": [Value("int64")],
    "remarks": [Value("string")],
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
        tokenizer: a `PreTrainedTokenizerBase` with a chat template.
        max_length: most tokens in prompt + one response; None: no limit. Default: 2048 (the paper's).
        max_prompt_length: most tokens in the prompt; None: no limit of its own. Default: 1800 (the paper's).
        skip_bad_rows: leave out and count rows that the chat template refuses or does not write whole, instead of
            raising. Default: False.
        chat_template_kwargs: passed on to the chat template; a row's own come on top.
        num_proc: processes; None: this one (fast tokenizers use threads already).

    Returns:
        Dataset of prompt_ids [P], response_ids R x [R_k], role, share, model, reward [R] and, where any row has them,
        ref_logp [R] and source_logp [R][M]; responses end with the end-of-turn token unless they came cut or are cut
        here. Kept on disk in the `datasets` cache under a fingerprint of rows, tokenizer, options and of the code that
        decides the ids. What was cut and changed on the way is counted in the log: ends of turns in answers, control
        tokens, whitespace, thoughts (`wrpo.data.rendering`, `wrpo.data.left_out`).

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
    places = [(row.get("file", "dataset"), row.get("row", index + 1)) for index, row in zip(indices, rows, strict=True)]
    attempt: Callable[..., Any] = functools.partial(_attempt, skip_bad_rows)
    rendered: list[Rendering | DataError] = [
        attempt(place, _rendered, row, renderer) for row, place in zip(rows, places, strict=True)
    ]
    good = [one for one in rendered if isinstance(one, Rendering)]
    if indices[0] == 0:
        _warn_of_endless_turns(good, renderer)
    rendered = [
        one if isinstance(one, DataError) else _without_ends_of_cut(row, one, renderer)
        for row, one in zip(rows, rendered, strict=True)
    ]
    good = [one for one in rendered if isinstance(one, Rendering)]
    ids = iter(token_ids(tokenizer, [text for one in good for text in (one.prompt, *one.whole.values())]))
    out = []
    for row, place, one in zip(rows, places, rendered, strict=True):
        tokens: dict | DataError
        if isinstance(one, DataError):
            tokens = one
        else:
            of_row = [next(ids) for _ in range(1 + len(one.whole))]
            tokens = attempt(place, _tokens, row, one, of_row, tokenizer, limits)
        out.append(_bad_row(tokens) if isinstance(tokens, DataError) else tokens)
    return {name: [row[name] for row in out] for name in out[0]}


def _attempt(skip_bad_rows: bool, place: tuple[str, int], compute: Callable[..., T], *arguments: Any) -> T | DataError:
    """What is computed, or, where bad rows are skipped, the error with its place in the data."""
    try:
        return compute(*arguments)
    except DataError as error:
        if not skip_bad_rows:
            raise error.at(*place) from error
        return error.at(*place)


def _rendered(row: dict, renderer: Renderer) -> Rendering:
    """A row, whose messages are JSON, as text."""
    names = [f"response {number} ({role})" for number, role in enumerate(row["role"], 1)]
    responses = dict(zip(names, map(json.loads, row["responses"]), strict=True))
    tools, options = (json.loads(row.get(name) or "null") for name in ("tools", "chat_template_kwargs"))
    return renderer(json.loads(row["prompt"]), responses, tools=tools, chat_template_kwargs=options)


def _without_ends_of_cut(row: dict, rendering: Rendering, renderer: Renderer) -> Rendering:
    """A response that ends before its model had ended it teaches no end."""
    cuts = row.get("cut") or [False] * len(rendering.whole)
    whole = {
        field: renderer.without_end(text) if cut else text
        for cut, (field, text) in zip(cuts, rendering.whole.items(), strict=True)
    }
    return rendering._replace(whole=whole)


def _tokens(row: dict, text: Rendering, ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, limits: dict) -> dict:
    """The tokenised row; `ids` are those of its texts, prompt first."""
    prompt, *whole = ids
    full = [
        response_ids(tokenizer, prompt, ids_of_both, both[len(text.prompt) :], field)
        for (field, both), ids_of_both in zip(text.whole.items(), whole, strict=True)
    ]
    kept, responses = truncate(prompt, full, **limits)
    out = {"prompt_ids": kept, "response_ids": responses} | {name: row.get(name) for name in _OF_RESPONSES}
    notes = {
        "prompt_cut": len(prompt) - len(kept),
        "response_cut": [len(a) - len(b) for a, b in zip(full, responses, strict=True)],
        "remarks": sorted(text.remarks | _remarks(full, row)),
    }
    return out | notes | {"problem": None, "field": None}


def _remarks(responses: list[list[int]], row: dict) -> set[str]:
    """What is odd about a row's responses beside each other."""
    is_rejected = [role == REJECTED for role in row["role"]]

    def split(values: list) -> tuple[list, list]:
        """(those of preferred responses, those of rejected ones) that are known."""
        pairs = [pair for pair in zip(is_rejected, values, strict=True) if pair[1] is not None]
        return [value for rejected, value in pairs if not rejected], [value for rejected, value in pairs if rejected]

    preferred, rejected = split(responses)
    better, worse = split(row.get("reward") or [None] * len(responses))
    remarks = {
        SAME_TEXT: any(ids in preferred for ids in rejected),
        CONTRARY: bool(better and worse) and min(better) < max(worse),
        ENDLESS: any(row.get("cut") or ()),
    }
    return {remark for remark, holds in remarks.items() if holds}


def _bad_row(error: DataError) -> dict:
    empty = dict.fromkeys([*_TOKENS, *_OF_RESPONSES])
    notes = {"prompt_cut": 0, "response_cut": [], "remarks": []}
    return empty | notes | {"problem": str(error), "field": error.field}


def _warn_of_endless_turns(rendered: list[Rendering], renderer: Renderer) -> None:
    if rendered and not renderer.ends_its_turns(next(iter(rendered[0].whole.values()))):
        logger.warning(
            "The chat template ends a response without a special token: the model cannot learn where to stop."
        )


# -- cache ------------------------------------------------------------------------------------------------------------


def _fingerprint(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *options: object) -> str:
    """Changes whenever the ids could: with rows, vocabulary, template, options, and the code that decides the ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    rendered = (rendering, chat_template, call_arguments, control_tokens, left_out)
    code = [_source(module) for module in (*rendered, continuation, truncation, sys.modules[__name__])]
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
    log_remarks(Counter(remark for remarks in notes["remarks"] for remark in remarks), "row")
    if bad.count == len(noted):
        raise DataError("at least one usable row", bad.report(), "Look at the first one.")
    absent = [name for name in ("ref_logp", "source_logp") if noted.data.column(name).null_count == len(noted)]
    tokens = noted.remove_columns([*_NOTES, *absent])
    return tokens.select([i for i, problem in enumerate(notes["problem"]) if problem is None]) if bad.count else tokens
