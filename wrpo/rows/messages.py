"""What a row asks and says: messages and text, checked. A message keeps every field that it has: chat templates read
more than two."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from .errors import DataError, shown
from .json_lines import unique_fields

Message = dict[str, Any]

_MESSAGE = "A message is an object with the strings 'role' and 'content'."
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")


class Asked(NamedTuple):
    """What a model is asked: messages, the last one not the assistant's, and what else its chat template reads."""

    messages: list[Message]
    tools: list[dict] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def prompt(self) -> str | list[Message]:
        """As a row holds it: a user's message of nothing but text is its text."""
        first = self.messages[0]
        is_text = len(self.messages) == 1 and first.keys() == {"role", "content"} and first["role"] == "user"
        return first["content"] if is_text else self.messages

    @property
    def beside(self) -> dict[str, Any]:
        """The fields beside the prompt, without those that are not there."""
        fields = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in fields.items() if value}


def asked(row: dict) -> Asked:
    """What a row asks of models: its `prompt`, with `system`, `tools` and `chat_template_kwargs` where it has them.

    Raises:
        DataError: with the field, without file and row.
    """
    refuse_other_media(row)
    messages = with_system(prompt_messages(row.get("prompt")), row.get("system"))
    refuse_assistant_at_the_end(messages)
    return Asked(messages, tools_of(row), options_of(row))


# -- messages ---------------------------------------------------------------------------------------------------------


def prompt_messages(value: Any) -> list[Message]:
    """The messages of a prompt; a string is the user's turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, "prompt")}]
    return checked_messages(value, "prompt")


def with_system(messages: list[Message], text: Any) -> list[Message]:
    """The messages after a system message of this text, which a row may hold in a column of its own."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return messages
    system = {"role": "system", "content": checked_text(text, "system")}
    first = messages[0]
    if first["role"] != "system":
        return [system, *messages]
    if (first.get("content") or "").strip() != text.strip():
        raise DataError("the system message of the conversation", shown(text), "Keep one of the two.", field="system")
    return messages


def refuse_assistant_at_the_end(messages: list[Message]) -> None:
    if messages[-1]["role"] == "assistant":
        todo = "An answer to an assistant message is a continuation; end the prompt with the user's turn."
        raise DataError("a last message that is not the assistant's", shown(messages[-1]), todo, field="prompt")


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


def message_text(message: Message) -> str:
    """What a message says: its content, and on a line of its own the JSON of its other fields, e.g. tool calls."""
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    texts = [message.get("content") or "", *([json.dumps(others, ensure_ascii=False)] if others else [])]
    return "\n".join(filter(None, texts))


# -- what the chat template reads beside the messages -----------------------------------------------------------------


def tools_of(row: dict) -> list | None:
    """The tools that a model may call, or None."""
    if row.get("functions"):
        todo = "Rename the column, each function in the form {type: function, function: ..}."
        raise DataError("tools under the name of tools", shown(row["functions"]), todo, field="functions")
    value = row.get("tools")
    tools = _held(value, "tools", list, "a list of tools, or its JSON text") or []
    tools = [parsed(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools that are objects", shown(value), "Write each tool as an object.", field="tools")
    return tools or None


def options_of(row: dict) -> dict | None:
    """The row's own options of the chat template, or None."""
    return _held(row.get("chat_template_kwargs"), "chat_template_kwargs", dict, "a mapping, or its JSON text")


def _held(value: Any, field: str, kind: type, expected: str) -> Any:
    """What a column holds, also as JSON text; None where that is nothing."""
    if isinstance(value, str):
        value = parsed(value, field) if value.strip() else None
    if value is None or value == kind():
        return None
    if not isinstance(value, kind):
        raise DataError(expected, shown(value), "Write it so, or leave the field out.", field=field)
    json_text(value, field)
    return value


def refuse_other_media(row: dict) -> None:
    """Raises DataError for a row with pictures or sound, of which no model would be told."""
    for name in _NOT_TEXT:
        value = row.get(name)
        if value is not None and not (isinstance(value, (str, list, dict)) and not value):
            todo = "Drop the row; leave the column out where the text stands for itself."
            raise DataError("text alone", type(value).__name__, todo, field=name)


# -- text -------------------------------------------------------------------------------------------------------------


def checked_text(value: Any, field: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError("text", f"{type(value).__name__} {shown(value)}", "Write it as a string.", field=field)
    if not may_be_empty and not value.strip():
        raise DataError("text that is not empty", shown(value), "Fill it in, or drop the row.", field=field)
    return utf8(value, field)


def text_of(row: dict, field: str, may_be_empty: bool = False) -> str:
    """What a row says in a field that it must have."""
    if field not in row:
        raise DataError("text", "no such field", "Fill it in, or drop the row.", field=field)
    return checked_text(row[field], field, may_be_empty)


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
        return json.loads(text, object_pairs_hook=unique_fields)
    except DataError as error:
        raise DataError(error.expected, f"{error.got} for {error.field!r}", error.todo, field=field) from None
    except (ValueError, RecursionError) as error:
        raise DataError("JSON text", f"{shown(text)} ({error})", "Repair the text.", field=field) from None
