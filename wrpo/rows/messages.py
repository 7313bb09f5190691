"""A prompt as messages, checked: a string is the user's turn."""

from __future__ import annotations

from typing import Any

from .errors import DataError, shown

Message = dict[str, str]

_MESSAGE = "A message is an object with the strings 'role' and 'content'."


def prompt_messages(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, "prompt")}]
    return checked_messages(value, "prompt")


def checked_messages(value: Any, field: str) -> list[Message]:
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise DataError("a string, a message or a list of messages", shown(value), _MESSAGE, field=field)
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise DataError("messages with a role", shown(message), _MESSAGE, field=field)
    return [
        {"role": utf8(m["role"], f"{field}.role"), "content": checked_text(m.get("content"), f"{field}.content")}
        for m in messages
    ]


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
