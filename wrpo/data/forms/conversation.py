"""Where a row says what was asked: a prompt, a conversation with its answer, or an instruction with its input."""

from __future__ import annotations

from typing import Any

from wrpo.rows.errors import DataError, shown

from .response import unpacked

# ShareGPT's names for who speaks.
ROLE_OF = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def prompt_of(row: dict) -> Any:
    """The prompt beside responses, or None: `prompt`, or LLaMA-Factory's `conversations` or `instruction`."""
    if row.get("prompt") is not None:
        return unpacked(row["prompt"])
    if row.get("conversations") is not None:
        return turns(row, "conversations")
    return instruction(row) if row.get("instruction") is not None else None


def turns(row: dict, field: str) -> list:
    """The messages of a conversation, or of ShareGPT's turns {from, value}."""
    value = unpacked(row[field])
    if not (isinstance(value, list) and value):
        raise DataError("a list of messages", shown(value), "Write the turns as messages.", field=field)
    return [as_message(turn, field) for turn in value]


def as_message(turn: Any, field: str) -> Any:
    """The message of a turn {from, value}; anything else as it is."""
    if not (isinstance(turn, dict) and {"from", "value"} <= turn.keys()):
        return turn
    if not isinstance(turn["from"], str) or turn["from"] not in ROLE_OF:
        todo = "Write it as a message with role and content, or drop the row."
        raise DataError(f"a turn from one of {sorted(ROLE_OF)}", shown(turn["from"]), todo, field=field)
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return others | {"role": ROLE_OF[turn["from"]], "content": turn["value"]}


def instruction(row: dict) -> list:
    """Alpaca's instruction, its input on the next lines; `history` holds earlier turns as [question, answer]."""
    texts = [text for text in (row["instruction"], row.get("input")) if text not in (None, "")]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("text in instruction and input", shown(texts), "Write them as strings.", field="instruction")
    return [*_history(row), {"role": "user", "content": "\n".join(texts)}]


def _history(row: dict) -> list:
    value = row.get("history") or []
    if not (isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)):
        raise DataError("pairs [question, answer]", shown(value), "Leave it out if there are none.", field="history")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]
