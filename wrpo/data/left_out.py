"""What a chat template leaves out of the messages that it is given: words must not vanish in silence.

Messages are looked for in the rendered text in their order, without regard to whitespace, which templates trim and add;
and other words of a user or a system must give another text, for theirs may stand in another message too.
All must be there whole, but for what templates take out on purpose, which is remarked: the thoughts of earlier answers
and switches such as /no_think. Tool calls are there when the name and every argument are,
as text or as JSON. What a message says beside that, e.g. the id of a call, is remarked where it is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from wrpo.rows.errors import DataError
from wrpo.rows.messages import Message

RESPACED = "whitespace of messages changed by the chat template"
SHORTENED = "thoughts or switches in the prompt left out by the chat template"
OF_DOCUMENTS = "the field {!r} of documents left out by the chat template"
UNWRITTEN = "the field {!r} of messages left out by the chat template"

CALLS, THOUGHTS = "tool calls", "the thoughts of an answer"

_OTHER = "wrpo-7c1e"
_ANYWHERE = ("system", "developer")  # templates move these, into the last user turn for one
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_SWITCHES = ("/no_think", "/think")
_THOUGHTS_END = re.compile(r"</[\w:]*(?:think|thinking|thought|reasoning)>|\[/THINK]|<\|END_THINKING\|>|◁/think▷")


class Rendered:
    """A rendered text, in which messages are looked for one after the other.

    Args:
        text: the text.
        remarks: where it is put down what was found changed.
    """

    def __init__(self, text: str, remarks: set[str]):
        self._text, self._dense, self._remarks = text, dense(text), remarks
        self._place = 0  # in the dense text, behind the last message found

    def find_prompt(self, messages: list[Message]) -> None:
        """Raises DataError for a message that is not whole, but for what templates take out on purpose."""
        for message in messages:
            start = 0 if message["role"] in _ANYWHERE else self._place
            end = self._end_of(message, start)
            if end is None:
                raise not_written(f"all of the {message['role']} message", "less of it", "prompt")
            self._find_fields(message, start, "prompt", is_answer=False)
            self._place = max(self._place, end if message["role"] not in _ANYWHERE else 0)

    def find_answer(self, message: Message, field: str, opening: str = "") -> None:
        """Raises DataError for an answer that is not whole, or that ends within `opening`, with which the text begins.

        Templates may write an answer's first words, `<think>`, into the opening of its turn.
        """
        content = message.get("content") or ""
        wanted = dense(content)
        start = max(self._place, len(dense(opening)) - len(wanted) + 1) if wanted else self._place
        if self._dense.find(wanted, start) < 0:
            without = _THOUGHTS_END.split(wanted)[-1]
            is_thought = without != wanted and without in self._dense
            raise not_written(f"{'the thought' if is_thought else 'all'} of an answer", "less of it", field)
        self._remark_space(content)
        self._find_fields(message, self._place, field, is_answer=True)

    def find_documents(self, documents: list[dict]) -> None:
        """Remarks each field of the documents whose words are not all there."""
        for name, value in (item for document in documents for item in document.items()):
            if not all(self._has(leaf, 0) for leaf in _leaves(value)):
                self._remarks.add(OF_DOCUMENTS.format(name))

    def _end_of(self, message: Message, start: int) -> int | None:
        """Where the message's content ends, or what is left of it; None where too little is."""
        content = message.get("content") or ""
        wanted = dense(content)
        for form in map(dense, _forms(content)):  # templates write what a tool said as JSON
            if (place := self._dense.find(form, start)) >= 0:
                self._remark_space(content if form == wanted else "")
                return place + len(form)
        place = -1
        if message["role"] == "assistant":
            wanted = _THOUGHTS_END.split(wanted)[-1]
            place = self._dense.find(wanted, start)
        elif _without_switches(wanted) in _without_switches(self._dense[start:]):
            wanted, place = "", start
        if place < 0:
            return None
        self._remarks.add(SHORTENED)
        return place + len(wanted)

    def _remark_space(self, content: str) -> None:
        if content not in self._text:
            self._remarks.add(RESPACED)

    def _find_fields(self, message: Message, start: int, field: str, is_answer: bool) -> None:
        for name in message.keys() - {"role", "content"}:
            value = message[name]
            if name in ("tool_calls", "function_call"):
                self._find_calls(value, start, field)
            elif not all(self._has(leaf, start) for leaf in _leaves(value)):
                if name in _THOUGHTS and is_answer:
                    raise not_written(THOUGHTS, "none of them", f"{field}.{name}")
                self._remarks.add(SHORTENED if name in _THOUGHTS else UNWRITTEN.format(name))

    def _find_calls(self, calls: Any, start: int, field: str) -> None:
        for call in calls if isinstance(calls, list) else [calls]:
            for leaf in _leaves(_spoken(call)):
                if not self._has(leaf, start):
                    name = function_name(call)
                    raise not_written(f"the call of {name!r}" if name else "tool calls", "less of it", field)

    def _has(self, leaf: str, start: int) -> bool:
        return any(self._dense.find(dense(form), start) >= 0 for form in _forms(leaf))


def refuse_unwritten_tools(tools: list, text: str) -> None:
    """Raises DataError where a tool's name is not in the rendered prompt: many templates know no tools."""
    for tool in tools:
        name = function_name(tool)
        if name is not None and name not in text:
            raise not_written(f"the tool {name!r}", "none of it", "tools")


def dense(text: str) -> str:
    """The text without whitespace."""
    return "".join(text.split())


def function_name(function: Any) -> str | None:
    """Of {"function": {"name": ..}}, and of the same without its envelope."""
    inner = function.get("function", function) if isinstance(function, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _spoken(call: Any) -> Any:
    """Name and arguments of a call, without its id and type."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict):
        return inner
    arguments = inner.get("arguments")
    return [inner.get("name"), _parsed(arguments) if isinstance(arguments, str) else arguments]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _leaves(value: Any) -> Iterator[str]:
    """Texts and numbers within a value, and the names that they stand under."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield from map(str, part)
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, (str, int, float)) and not isinstance(part, bool):
            yield str(part)


def _forms(text: str) -> Iterator[str]:
    """The text as it is, as JSON, and as JSON within the text of JSON."""
    yield text
    for ascii_alone in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_alone)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_alone)[1:-1]


def _without_switches(text: str) -> str:
    for switch in _SWITCHES:
        text = text.replace(switch, "")
    return text


def others(message: Message) -> Iterator[tuple[str, Message]]:
    """(what is changed, the message with other tool calls or thoughts, or other words of a user or a system)."""
    if message["role"] in (*_ANYWHERE, "user") and message.get("content"):
        yield f"the {message['role']} message", message | {"content": _OTHER}
    if calls := message.get("tool_calls"):
        renamed = [_renamed(call) for call in calls] if isinstance(calls, list) else []
        yield CALLS, message | {"tool_calls": renamed}
    for name in _THOUGHTS:
        if isinstance(message.get(name), str):
            yield THOUGHTS, message | {name: _OTHER}


def _renamed(call: Any) -> Any:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        return {"type": "function", "function": {"name": _OTHER, "arguments": {}}}
    inner = inner | {"name": _OTHER}
    return call | {"function": inner} if "function" in call else inner


def not_written(what: str, got: str, field: str) -> DataError:
    """The error of a message of which the template writes too little."""
    todo = "Take a chat template that does (chat_template_file), or write the row as this one wants it."
    return DataError(f"a chat template that writes {what}", got, todo, field=field)
