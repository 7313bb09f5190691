"""What a server says in the place of an answer, in whatever form it says it.

{"error": {"message": .., "code": ..}}    OpenAI and most others, also with the status 200
{"error": ".."}   {"message": ".."}   {"errors": [..]}
{"detail": ".."}   {"detail": [{"loc": ["body", "seed"], "msg": ".."}]}    FastAPI: vLLM, TGI
any other text or JSON, as it is
"""

from __future__ import annotations

import json
import re
from typing import Any

_WORDS = ("message", "error", "detail", "msg", "errors", "error_message")
_DEEPEST = 5  # levels of lists and objects that are looked through
_NO_MONEY = "insufficient_quota"  # OpenAI's code; its status, 429, is that of too many requests


class Refusal(Exception):
    """No answer: the HTTP status or the one that the words name, if they name one, and the words.

    Attributes:
        is_final: the account has nothing left.  retry_after: seconds that the server asks to wait, or None.
    """

    def __init__(self, body: Any, status: int | None = None, retry_after: float | None = None):
        super().__init__(words_of(body) or _as_text(body))
        self.status = _status_in(body) if status is None else status
        self.is_final = self.status == 402 or _NO_MONEY in (_field(body, "code"), _field(body, "type"))
        self.retry_after = retry_after


def words_of(body: Any, depth: int = 0) -> str:
    """One line; empty where no field of the body is known to hold words."""
    if isinstance(body, str):
        return " ".join(body.split())
    if depth == _DEEPEST:
        return ""
    if isinstance(body, list):
        return "; ".join(filter(None, (words_of(part, depth + 1) for part in body)))
    if not isinstance(body, dict):
        return ""
    said = next((words for name in _WORDS if (words := words_of(body.get(name), depth + 1))), "")
    place = ".".join(map(str, body["loc"])) if isinstance(body.get("loc"), list) else ""
    return f"{place}: {said}" if said and place else said


def _as_text(body: Any) -> str:
    return "no words" if body is None else json.dumps(body, ensure_ascii=False)


def _status_in(body: Any) -> int | None:
    """The HTTP status that an error names in its JSON, as a number or its digits."""
    for name in ("code", "status", "status_code"):
        value = _field(body, name)
        if re.fullmatch("[45][0-9][0-9]", str(value)):
            return int(value)
    return None


def _field(body: Any, name: str) -> Any:
    """Of the error in a body, or of the body."""
    error = body.get("error") if isinstance(body, dict) else None
    return next((part[name] for part in (error, body) if isinstance(part, dict) and part.get(name) is not None), None)
