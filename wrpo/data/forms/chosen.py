"""Forms that say which response is better by the names of their fields."""

from __future__ import annotations

import re

from wrpo.data.roles import REJECTED, ROLES, SOURCE, TARGET
from wrpo.rows.errors import DataError, shown

from .columns import OF_EXAMPLES, with_columns
from .conversation import as_message, prompt_of, turns
from .response import Reading, Response, responses_in

# Letters, digits and accents, but of scripts that write no spaces between words; what may stand between two of them.
_LETTER = r"(?:[^\W_\u0e00-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]|[\u0300-\u036f])"
_INNER = r"['’.,/_-]?"
_BEFORE, _AFTER = re.compile(rf"{_LETTER}{_INNER}\Z"), re.compile(rf"{_INNER}{_LETTER}")
_OTHER_NAMES = ("question", "query", "problem", "input", "context")  # of a prompt, that no form here reads


def example(row: dict) -> Reading:
    """The form that all others become: `responses`, and for each its `role`."""
    responses, roles = responses_in(row, responses=TARGET), row["role"]
    if not (isinstance(roles, list) and len(roles) == len(responses) and set(map(str, roles)) <= set(ROLES)):
        todo = "Give one role for each response."
        raise DataError(f"{len(responses)} of {', '.join(ROLES)}", shown(roles), todo, field="role")
    responses = [response._replace(role=role) for response, role in zip(responses, roles, strict=True)]
    return prompt_of(row), with_columns(row, responses, OF_EXAMPLES)


def explicit(row: dict) -> Reading:
    """source_chosen, target_chosen, rejected: each one or several, one of the first two may be missing."""
    return prompt_of(row), responses_in(row, source_chosen=SOURCE, target_chosen=TARGET, rejected=REJECTED)


def with_reference(row: dict) -> Reading:
    """TPO: the gold answer, `reference`, comes from elsewhere, as a source's does."""
    return prompt_of(row), responses_in(row, reference=SOURCE, chosen=TARGET, rejected=REJECTED)


def chosen(row: dict) -> Reading:
    """A pair; or the paper's triple, where of several chosen the last is the target's and the others are sources'."""
    responses = [
        r._replace(value=as_message(r.value, r.field)) for r in responses_in(row, chosen=SOURCE, rejected=REJECTED)
    ]
    last = sum(response.role == SOURCE for response in responses) - 1
    responses[last] = responses[last]._replace(role=TARGET)
    prompt = prompt_of(row)
    return _split(row, responses) if prompt is None else (prompt, responses)


def _split(row: dict, responses: list[Response]) -> Reading:
    """Two texts without a prompt: what both begin with, in whole words, is the prompt, but for a last space.

    A prompt that ended within a word would be one that nobody wrote, in tokens that no model ever gave.
    """
    texts = [response.value for response in responses]
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        return None, responses
    _refuse_lost_prompt(row)
    length = next((k for k, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    shared = _whole_words(texts, length).removesuffix(" ")
    return shared or None, [response._replace(value=response.value[len(shared) :]) for response in responses]


def _whole_words(texts: list[str], length: int) -> str:
    """Of the first `length` characters, which the texts share, those before a word in which they part."""
    shared = texts[0][:length]
    if not (_BEFORE.search(shared[-2:]) and any(_AFTER.match(text[length : length + 2]) for text in texts)):
        return shared
    return shared[: max((space.end() for space in re.finditer(r"\s", shared)), default=0)]


def _refuse_lost_prompt(row: dict) -> None:
    """Raises DataError where a prompt was meant, and what the answers begin with by chance would take its place."""
    if "prompt" in row:
        todo = "Add it, or drop the row. Where both texts begin with the prompt, leave the column out."
        raise DataError("a value", "none", todo, field="prompt")
    for name in _OTHER_NAMES:
        if row.get(name):
            todo = f"Rename {name!r} to 'prompt'. Where both texts begin with the prompt, leave it out."
            raise DataError("a prompt under the name of prompt", shown(row[name]), todo, field=name)


def rejected_beside(row: dict) -> Reading:
    """ms-swift: `messages` ends with the better answer, `rejected_response` or `rejected_messages` is the other."""
    name = "rejected_response" if row.get("rejected_response") is not None else "rejected_messages"
    better = Response("messages", turns(row, "messages"), TARGET)
    return None, [better, *responses_in(row, **{name: REJECTED})]
