"""One raw row into one triple: prompt, source answers, best and worst target answer.

Two forms are understood.

    released (as the paper's data)   prompt, chosen: [source_1 .. source_K, target], rejected: [target]
    explicit                         prompt, source_chosen: one or many, target_chosen, rejected

SFT also takes one answer a row: prompt, response.

The two forms may carry, each with one entry for each source answer, `source_model` (names), `source_weight` (shares
that sum to 1; default 1/K each) and `source_reward` (numbers, any unit); and `source_logp`, for each response (sources,
target, rejected) its mean log-prob per token under each of M models, each with its own tokens. A prompt is a string, a
message, or a list of messages; a response is a string, an assistant message, or a list of messages that ends with the
assistant's and repeats the prompt before it. Where the prompt is missing, or is the bare text of a user turn, the
repeated part is the prompt.
"""

from __future__ import annotations

import math
from typing import Any

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Message, checked_messages, checked_text, prompt_messages, utf8

EXPLICIT = ("source_chosen", "target_chosen")
WEIGHT_TOLERANCE = 1e-4  # what ten shares written with five decimals can miss 1 by
LARGEST_NUMBER = 1e30  # sums and differences stay finite, in float32 too

_FORMS = (
    "A row is {'prompt', 'source_chosen', 'target_chosen', 'rejected'} or {'prompt', 'chosen': [source, target], "
    "'rejected'}."
)
_RESPONSE = "A response is text, an assistant's message, or messages that end with one."
_SFT_FORMS = "A row is {'prompt', 'response'}, {'prompt', 'source_chosen'} or {'prompt', 'chosen'}."


def normalise(row: dict, *, targets: bool = True) -> dict:
    """The explicit row that everything after works on.

    Args:
        row: a raw row in either form; fields beyond the form are ignored.
        targets: False for SFT rows, which need no `target_chosen` and `rejected` and do not keep them.

    Returns:
        {"prompt": list of {"role", "content"}, "source_chosen": list of K str, "source_weight": list of K float that
        sum to 1, "source_model": list of K (str | None), "source_reward": list of K float or None, "target_chosen":
        str, "rejected": str, "source_logp": list of K + 2 lists of M float, nats, or None}

    Raises:
        DataError: with the field, without file and row.
    """
    fields = _response_fields(row, targets)
    split = {name: _split_response(value, name) for name, value in fields.items()}
    triple: dict[str, Any] = {"prompt": _prompt(row, {name: prefix for name, (prefix, _) in split.items()})}
    sources = [text for _, text in split.values()]
    if targets:
        *sources, triple["target_chosen"], triple["rejected"] = sources
    triple["source_chosen"] = sources
    triple["source_weight"] = _weights(row.get("source_weight"), len(sources))
    triple["source_model"] = _models(row.get("source_model"), len(sources))
    triple["source_reward"] = _rewards(row.get("source_reward"), len(sources))
    if targets:
        triple["source_logp"] = _logp(row.get("source_logp"), len(sources) + 2)
    return triple


# -- the two forms ----------------------------------------------------------------------------------------------------


def _response_fields(row: dict, targets: bool) -> dict[str, Any]:
    """Field name -> raw response, in the order sources, then target, then rejected (the last two if `targets`)."""
    if any(row.get(name) is not None for name in EXPLICIT):
        return _explicit_fields(row, targets)
    if row.get("chosen") is not None:
        return _released_fields(row, targets)
    if not targets and row.get("response") is not None:
        return {"response": _one(row["response"], "response")}
    expected = "the fields of a triple" if targets else "an answer"
    raise DataError(expected, f"fields {sorted(map(str, row))}", _FORMS if targets else _SFT_FORMS)


def _explicit_fields(row: dict, targets: bool) -> dict[str, Any]:
    sources = _many(_required(row, "source_chosen"), "source_chosen")
    fields = {f"source_chosen[{k}]": value for k, value in enumerate(sources)}
    if targets:
        fields["target_chosen"] = _one(_required(row, "target_chosen"), "target_chosen")
        fields["rejected"] = _one(_required(row, "rejected"), "rejected")
    return fields


def _released_fields(row: dict, targets: bool) -> dict[str, Any]:
    chosen = _many(_required(row, "chosen"), "chosen")
    if targets and len(chosen) < 2:
        raise DataError("the source's answer(s), then the target's", f"{len(chosen)} answer", _FORMS, field="chosen")
    sources = chosen if len(chosen) == 1 else chosen[:-1]
    fields = {f"chosen[{k}]": value for k, value in enumerate(sources)}
    if targets:
        fields[f"chosen[{len(chosen) - 1}]"] = chosen[-1]
        fields["rejected"] = _one(_required(row, "rejected"), "rejected")
    return fields


def _required(row: dict, field: str) -> Any:
    if row.get(field) is None:
        raise DataError("a value", "none" if field in row else "no such field", "Add it, or drop the row.", field=field)
    return row[field]


def _many(value: Any, field: str) -> list:
    """The responses in a field that may hold one or several."""
    if isinstance(value, (str, dict)) or _is_conversation(value):
        return [value]
    if not isinstance(value, list):
        raise DataError("a response or a list of responses", shown(value), _RESPONSE, field=field)
    if not value:
        raise DataError("at least one response", "an empty list", "Add one, or drop the row.", field=field)
    return value


def _one(value: Any, field: str) -> Any:
    responses = _many(value, field)
    if len(responses) != 1:
        raise DataError("one response", f"{len(responses)}", "Keep one, or write a row for each.", field=field)
    return responses[0]


def _is_conversation(value: Any) -> bool:
    """A list of messages that is one response; a list of assistant messages alone is several."""
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        return False
    return len(value) == 1 or value[0].get("role") != "assistant"


# -- prompt and responses ---------------------------------------------------------------------------------------------


def _split_response(value: Any, field: str) -> tuple[list[Message], str]:
    """(the messages that repeat the prompt, the response's text)."""
    if isinstance(value, str):
        return [], checked_text(value, field)
    messages = checked_messages(value, field)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            "an assistant message at the end", f"role {messages[-1]['role']!r}", "End with the answer.", field=field
        )
    return messages[:-1], messages[-1]["content"]


def _prompt(row: dict, repeated: dict[str, list[Message]]) -> list[Message]:
    """The prompt as messages: the field's own, or what the responses repeat."""
    prefixes = {name: prefix for name, prefix in repeated.items() if prefix}
    shared = next(iter(prefixes.values()), None)
    for name, prefix in prefixes.items():
        if prefix != shared:
            raise DataError("the same messages before every answer", shown(prefix), "Repeat one prompt.", field=name)
    if shared is None or row.get("prompt") is not None:
        prompt = prompt_messages(_required(row, "prompt"))
        shared = prompt if shared is None else shared
        if prompt != shared and not (len(prompt) == 1 and _is_turn_of(prompt[0], shared)):
            todo = "Repeat the prompt before the answers, or leave it out there."
            raise DataError("the prompt that the answers repeat", shown(row["prompt"]), todo, field="prompt")
    if shared[-1]["role"] == "assistant":
        todo = "An answer to an assistant message is a continuation; end the prompt with the user's turn."
        raise DataError("a last message that is not the assistant's", shown(shared[-1]), todo, field="prompt")
    return shared


def _is_turn_of(turn: Message, conversation: list[Message]) -> bool:
    return any(m["role"] == turn["role"] and m["content"].strip() == turn["content"].strip() for m in conversation)


# -- sources ----------------------------------------------------------------------------------------------------------


def _weights(value: Any, count: int) -> list[float]:
    """K shares >= 0 that sum to 1 exactly; None gives 1/K each."""
    if value is None:
        return [1.0 / count] * count
    weights = value if isinstance(value, list) else [value]
    if not all(_is_number(w) for w in weights) or len(weights) != count:
        todo = "Give one number for each source answer, or leave the field out for equal shares."
        raise DataError(f"{count} number{'s' * (count > 1)}", shown(value), todo, field="source_weight")
    total = math.fsum(weights) if all(abs(w) <= LARGEST_NUMBER for w in weights) else math.inf
    if not (all(w >= 0 for w in weights) and abs(total - 1) <= WEIGHT_TOLERANCE):
        todo = "Divide each by their sum."
        raise DataError("shares >= 0 that sum to 1", f"{shown(value)}, sum {total:g}", todo, field="source_weight")
    return [w / total for w in weights]


def _models(value: Any, count: int) -> list[str | None]:
    models = value if isinstance(value, list) else [value] * (count if value is None else 1)
    if not all(model is None or isinstance(model, str) for model in models) or len(models) != count:
        todo = "Give one name for each source answer, or leave the field out."
        raise DataError(f"{count} name{'s' * (count > 1)}", shown(value), todo, field="source_model")
    return [None if model is None else utf8(model, "source_model") for model in models]


def _rewards(value: Any, count: int) -> list[float] | None:
    if value is None:
        return None
    rewards = value if isinstance(value, list) else [value]
    # An integer may be too large for a float, so it is compared before it is converted; NaN fails the comparison.
    if not all(_is_number(reward) and abs(reward) <= LARGEST_NUMBER for reward in rewards) or len(rewards) != count:
        todo = f"Give one number for each source answer, at most {LARGEST_NUMBER:g} in size, or leave the field out."
        raise DataError(f"{count} finite number{'s' * (count > 1)}", shown(value), todo, field="source_reward")
    return [float(reward) for reward in rewards]


def _logp(value: Any, count: int) -> list[list[float]] | None:
    if value is None:
        return None
    rows = value if isinstance(value, list) and all(isinstance(row, list) and row for row in value) else []
    models = len(rows[0]) if rows else 0
    if len(rows) != count or any(len(row) != models for row in rows):
        todo = "Give one list for each source, target and rejected response, in this order, or leave the field out."
        raise DataError(f"{count} lists with one number for each model", shown(value), todo, field="source_logp")
    if not all(_is_number(logp) and -LARGEST_NUMBER <= logp <= 0 for row in rows for logp in row):
        todo = "Divide the sum over the response's tokens by their number."
        raise DataError("finite mean log-probs, at most 0", shown(value), todo, field="source_logp")
    return [[float(logp) for logp in row] for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
