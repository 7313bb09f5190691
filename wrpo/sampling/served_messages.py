"""Messages as OpenAI's interface has them, which is stricter than chat templates are."""

from __future__ import annotations

import json
from typing import Any

from wrpo.rows.messages import Message


def served_messages(messages: list[Message]) -> list[Message]:
    """The same messages; arguments of calls are JSON text, and each call and its result share an id.

    Ids are given where there are none, to results in the order of their calls.
    """
    served: list[Message] = []
    open_ids: list[str] = []
    for number, message in enumerate(messages):
        if isinstance(calls := message.get("tool_calls"), list):
            calls = [_served_call(call, f"call_{number}_{k}") for k, call in enumerate(calls)]
            open_ids = [call["id"] for call in calls if isinstance(call, dict)]
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool" and open_ids:
            message = {"tool_call_id": open_ids[0]} | message
            open_ids = [call_id for call_id in open_ids if call_id != message["tool_call_id"]]
        served.append(message)
    return served


def _served_call(call: Any, call_id: str) -> Any:
    """{"id", "type", "function": {"name", "arguments"}}, also of a call without that envelope."""
    if not isinstance(call, dict):
        return call
    function = call.get("function", {name: call[name] for name in ("name", "arguments") if name in call})
    if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
        function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {"id": call.get("id", call_id), "type": call.get("type", "function"), "function": function}
