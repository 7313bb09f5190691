"""Messages and text of a row, checked. A message keeps every field that it has: chat templates read more than two."""

from __future__ import annotations

import json
from typing import Any

from .errors import DataError, shown

Message = dict[str, Any]

_MESSAGE = "A message is an object with the strings 'role' and 'content'."


def prompt_messages(value: Any) -> list[Message]:
    """A prompt that models are asked: role and text of each turn; a string is the user's turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, "prompt")}]
    messages = checked_messages(value, "prompt")
    return [{"role": m["role"], "content": checked_text(m.get("content"), "prompt.content")} for m in messages]


def checked_messages(value: Any, field: str) -> list[Message]:
    """The messages as they came; a field that is null is left out, since templates ask whether a field is there.

    `content` is text that is not empty; beside `tool_calls` it may be empty, null or missing.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise DataError("a string, a message or a list of messages", shown(value), _MESSAGE, field=field)
    return [_checked(message, field) for message in messages]


def _checked(message: Any, field: str) -> Message:
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        raise DataError("messages with a role", shown(message), _MESSAGE, field=field)
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    utf8(message["role"], f"{field}.role")
    if isinstance(message.get("tool_calls"), str):  # how Parquet keeps values of mixed types
        message["tool_calls"] = parsed(message["tool_calls"], f"{field}.tool_calls")
    if not message.get("tool_calls") or message.get("content") not in (None, ""):
        checked_text(message.get("content"), f"{field}.content")
    for name in message.keys() - {"role", "content"}:
        json_text(message[name], f"{field}.{name}")
    return message


def checked_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError("text", f"{type(value).__name__} {shown(value)}", "Write it as a string.", field=field)
    if not value.strip():
        raise DataError("text that is not empty", shown(value), "Fill it in, or drop the row.", field=field)
    return utf8(value, field)


def utf8(value: str, field: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair, {value[error.start]!r}, at character {error.start}"
        raise DataError("UTF-8 text", got, "Repair the escape.", field=field) from None
    return value


def json_text(value: Any, field: str) -> str:
    """The value as JSON in UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        todo = "Write dates, bytes and the like as text."
        raise DataError("a value that JSON has", f"{shown(value)} ({error})", todo, field=field) from None
    return utf8(text, field)


def parsed(text: str, field: str) -> Any:
    """The value that a text is the JSON of."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("JSON text", f"{shown(text)} ({error})", "Repair the text.", field=field) from None
