"""One response as a form finds it in a row, and how the fields that hold responses are read."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from wrpo.rows.errors import DataError, shown

_RESPONSE = "A response is text, an assistant's message, or messages that end with one."


class Response(NamedTuple):
    """What a row holds of one response.

    field: where it stands, for messages of errors. value: text, a message or messages, not yet checked. share: of its
    role; None: an equal one. The others are None where the row does not say.
    """

    field: str
    value: Any
    role: str
    share: float | None = None
    model: str | None = None
    reward: float | None = None
    ref_logp: float | None = None
    source_logp: list[float] | None = None
    cut: bool | None = None


Reading = tuple[Any, list[Response]]  # the prompt, not yet checked (None: it is only in the responses); the responses


def responses_in(row: dict, **roles: str) -> list[Response]:
    """The responses of the named fields, each with its role; a field may hold one, several or nothing.

    JSON text of messages is read as messages, in a list always, and alone where no other field is alone and plain text:
    one answer may be JSON because it was asked for.
    """
    held = {name: row[name] for name in roles if row.get(name) is not None}
    is_plain = any(isinstance(value, str) and from_json(value) is None for value in held.values())
    held = {name: value if is_plain and isinstance(value, str) else unpacked(value) for name, value in held.items()}
    return [Response(place, value, roles[name]) for name in held for place, value in named(held[name], name)]


def named(value: Any, field: str) -> list[tuple[str, Any]]:
    """(`field`, response) of a field with one response, (`field[k]`, response) for each of a list of them."""
    if isinstance(value, (str, dict)) or is_conversation(value):
        return [(field, value)]
    if not isinstance(value, list):
        raise DataError("a response or a list of responses", shown(value), _RESPONSE, field=field)
    if not value:
        raise DataError("at least one response", "an empty list", "Add one, or drop the row.", field=field)
    return [(f"{field}[{k}]", response) for k, response in enumerate(value)]


def is_conversation(value: Any) -> bool:
    """Whether a list is the messages of one response; a list of assistant messages alone is several responses."""
    if not (isinstance(value, list) and value and all(isinstance(part, dict) for part in value)):
        return False
    return len(value) == 1 or any(part.get("role") != "assistant" for part in value)


def is_several_messages(value: Any) -> bool:
    """Whether a field of responses holds messages of the assistant alone, each of which is one."""
    value = unpacked(value)
    return isinstance(value, list) and len(value) > 1 and isinstance(value[0], dict) and not is_conversation(value)


def unpacked(value: Any) -> Any:
    """Messages in the place of their JSON text; anything else as it is."""
    messages = from_json(value)
    return value if messages is None else messages


def from_json(value: Any) -> Any:
    """Messages in the place of the JSON text of messages, also in a list; None for other text."""
    if isinstance(value, str):
        return _messages_of(value)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        parts = [_messages_of(part) for part in value]
        return None if None in parts else parts
    return value


def _messages_of(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    parts = value if isinstance(value, list) else [value]
    return value if parts and all(map(_is_message, parts)) else None


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
    )
