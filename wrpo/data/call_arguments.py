"""Arguments of tool calls: a mapping, as most chat templates want it, or its JSON text, as OpenAI's interface is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from wrpo.rows.messages import Message


def forms_of_calls(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are; if they hold calls, also with all arguments as mappings, and as JSON text."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        yield _with_arguments(messages, _as_mapping)
        yield _with_arguments(messages, _as_text)


def quotes_arguments(messages: list[Message], text: str) -> bool:
    """Whether JSON text of arguments was written as a string of JSON: no model calls a tool so."""
    written = (
        inner["arguments"]
        for message in messages
        for call in _calls(message)
        if isinstance(inner := _function(call), dict) and isinstance(inner.get("arguments"), str)
    )
    return any(
        isinstance(_as_mapping(arguments), dict) and json.dumps(arguments, ensure_ascii=ascii_alone) in text
        for arguments in written
        for ascii_alone in (False, True)
    )


def _with_arguments(messages: list[Message], convert: Callable[[Any], Any]) -> list[Message]:
    def of_message(message: Message) -> Message:
        calls = [_converted(call, convert) for call in _calls(message)]
        return message | {"tool_calls": calls} if calls else message

    return [of_message(message) for message in messages]


def _converted(call: Any, convert: Callable[[Any], Any]) -> Any:
    inner = _function(call)
    if not isinstance(inner, dict) or "arguments" not in inner:
        return call
    inner = inner | {"arguments": convert(inner["arguments"])}
    return call | {"function": inner} if "function" in call else inner


def _calls(message: Message) -> list:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _function(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else None


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
