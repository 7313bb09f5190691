"""One raw row into one example: a prompt and its responses, each with its role and its share of it."""

from __future__ import annotations

from typing import Any

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import (
    Message,
    checked_messages,
    checked_text,
    options_of,
    prompt_messages,
    refuse_assistant_at_the_end,
    refuse_other_media,
    tools_of,
    with_system,
)

from .forms import read_form
from .forms.response import Response
from .roles import REJECTED, ROLES, best_response

STAGES = ("preference", "sft")


def example_of(row: dict, *, stage: str = "preference", from_scores: bool = False) -> dict[str, Any]:
    """The example that a row of any form in `wrpo.data.forms` is; fields beyond the form are ignored.

    Args:
        row: a raw row.
        stage: "preference": at least one rejected and one better response. "sft": the best answer alone, that is the
            source's with the largest share, else the target's. Default: "preference".
        from_scores: rows that score all their answers give all of them, not the best and the worst. Default: False.

    Returns:
        {"prompt": list of messages, "responses": list of R assistant messages, "role": list of R "source" | "target" |
        "rejected", in this order, "share": list of R float > 0 that sum to 1 in each role, "model": list of R (str |
        None), "reward": list of R (float | None), "ref_logp": list of R float, nats, or None, "source_logp": list of R
        lists of M float, nats a token, or None, "cut": list of R bool, or None, "tools": list or None,
        "chat_template_kwargs": dict or None}. Messages, tools and options are as they came.

    Raises:
        DataError: with the field, without file and row.  ValueError: another stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    refuse_other_media(row)
    prompt, responses = read_form(row, stage, from_scores)
    responses = [_best(responses)] if stage == "sft" else _with_preference(responses)
    split = {response.field: _split(response.value, response.field) for response in responses}
    _refuse_one_text([answer for _, answer in split.values()])
    return {
        "prompt": _prompt(prompt, {field: repeated for field, (repeated, _) in split.items()}, row.get("system")),
        "responses": [answer for _, answer in split.values()],
        "role": [response.role for response in responses],
        "share": [response.share for response in responses],
        "model": [response.model for response in responses],
        "reward": [response.reward for response in responses],
        "ref_logp": _of_all(responses, "ref_logp"),
        "source_logp": _of_all(responses, "source_logp"),
        "cut": _cuts(responses),
        "tools": tools_of(row),
        "chat_template_kwargs": options_of(row),
    }


def in_order_of_row(row: dict, values: list, *, from_scores: bool = False) -> list:
    """Values of an example's responses, for a column of its row: None for a response that has no share.

    Args:
        row: the raw row that `example_of` makes a preference of.
        values: one for each response of that example, in the example's order.
        from_scores: as for `example_of`.
    """
    _, responses = read_form(row, "preference", from_scores)
    of_row: list = [None] * len(responses)
    for place, value in zip(_in_order_of_roles(responses), values, strict=True):
        of_row[place] = value
    return of_row


# -- responses --------------------------------------------------------------------------------------------------------


def _with_preference(responses: list[Response]) -> list[Response]:
    """Those with a share, in the order of their roles."""
    kept = [responses[place] for place in _in_order_of_roles(responses)]
    roles = {response.role for response in kept}
    if REJECTED not in roles:
        got = "responses that are all worth the same: no preference"
        raise DataError("a rejected response", got, "Drop the row, or keep it for wrpo sft.", field="rejected")
    if len(roles) == 1:
        todo = "Add the better one, or drop the row."
        raise DataError("a response of a source or the target", "rejected ones alone", todo, field="role")
    return kept


def _in_order_of_roles(responses: list[Response]) -> list[int]:
    """Places of the responses with a share."""
    places = [place for place, response in enumerate(responses) if response.share]
    return sorted(places, key=lambda place: ROLES.index(responses[place].role))


def _refuse_one_text(answers: list[Message]) -> None:
    """Raises DataError where all responses are the same: every gradient is zero."""
    if len(answers) > 1 and all(answer == answers[0] for answer in answers):
        got = f"one text for all {len(answers)}, {shown(answers[0].get('content'))}"
        raise DataError("responses that differ", got, "Drop the row.", field="rejected")


def _best(responses: list[Response]) -> Response:
    roles, shares = [response.role for response in responses], [response.share or 0.0 for response in responses]
    if set(roles) <= {REJECTED}:
        raise DataError("a response of a source or the target", "rejected ones alone", "Drop the row.", field="role")
    return responses[best_response(roles, shares)]._replace(share=1.0)


def _split(value: Any, field: str) -> tuple[list[Message], Message]:
    """(the messages that repeat the prompt, the response)."""
    if isinstance(value, str):
        return [], {"role": "assistant", "content": checked_text(value, field)}
    *repeated, answer = checked_messages(value, field)
    if answer["role"] != "assistant":
        got = f"role {answer['role']!r}"
        raise DataError("an assistant message at the end", got, "End with the answer.", field=field)
    return repeated, answer


def _of_all(responses: list[Response], name: str) -> list | None:
    """What every response has, or None where none has it."""
    values = [getattr(response, name) for response in responses]
    if None in values and any(value is not None for value in values):
        lacking = responses[values.index(None)].field
        raise DataError("one for every response", f"none for {lacking}", "Add it, or leave all out.", field=name)
    return None if None in values else values


def _cuts(responses: list[Response]) -> list[bool] | None:
    """Whether each response is cut, where the row says so of any; of the others nobody said it."""
    known = any(response.cut is not None for response in responses)
    return [bool(response.cut) for response in responses] if known else None


# -- prompt -----------------------------------------------------------------------------------------------------------


def _prompt(value: Any, repeated: dict[str, list[Message]], system: Any) -> list[Message]:
    """The prompt as messages: the field's own, or what the responses repeat; a column `system` is its first."""
    prefixes = {field: prefix for field, prefix in repeated.items() if prefix}
    shared = next(iter(prefixes.values()), None)
    for field, prefix in prefixes.items():
        if prefix != shared:
            raise DataError("the same messages before every answer", shown(prefix), "Repeat one prompt.", field=field)
    if shared is None or value is not None:
        prompt = _own_prompt(value)
        shared = prompt if shared is None else shared
        if prompt != shared and not (len(prompt) == 1 and _is_turn_of(prompt[0], shared)):
            todo = "Repeat the prompt before the answers, or leave it out there."
            raise DataError("the prompt that the answers repeat", shown(value), todo, field="prompt")
    refuse_assistant_at_the_end(shared)
    return with_system(shared, system)


def _own_prompt(value: Any) -> list[Message]:
    if value is None:
        raise DataError("a value", "none", "Add it, or drop the row.", field="prompt")
    return prompt_messages(value)


def _is_turn_of(turn: Message, conversation: list[Message]) -> bool:
    def said(message: Message) -> tuple[str, str]:
        return message["role"], (message.get("content") or "").strip()

    return said(turn) in map(said, conversation)
