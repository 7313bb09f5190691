"""Forms with one answer, for supervised fine-tuning."""

from __future__ import annotations

from wrpo.data.roles import TARGET

from .conversation import instruction, prompt_of, turns
from .response import Reading, Response


def messages(row: dict) -> Reading:
    """A conversation that ends with the answer."""
    return None, [Response("messages", turns(row, "messages"), TARGET)]


def conversations(row: dict) -> Reading:
    """ShareGPT: turns {from, value}, the last one the answer."""
    return None, [Response("conversations", turns(row, "conversations"), TARGET)]


def output(row: dict) -> Reading:
    """Alpaca: instruction, input and output."""
    return instruction(row), [Response("output", row["output"], TARGET)]


def completion(row: dict) -> Reading:
    return prompt_of(row), [Response("completion", row["completion"], TARGET)]


def response(row: dict) -> Reading:
    """As `wrpo sample` writes it."""
    return prompt_of(row), [Response("response", row["response"], TARGET)]
