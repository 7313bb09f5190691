"""The number that a judge's reply gives: read where it stands by itself, and never guessed.

    read        8    **8**    8/10    8 out of 10                 as the whole reply
                {"reason": "short", "score": 8}               as an object of JSON anywhere, its outermost score
                Score: 8    Score (1-10): 8    **Rating:** 8/10   as a line or sentence of its own, anywhere
    not read    Score: 4/5 on a scale that ends at 10, Score: 7-8, Score: 8 or 9, Score: 8 (9 if it were shorter), two
                scores that differ, thoughts that never end

What a model thinks before it answers, `<think>...</think>` and the like, is no part of its reply. A pattern of one's
own may match anywhere in the rest; the numbers that it finds must be whole ones, on the scale, and all the same.
"""

from __future__ import annotations

import json
import re
from typing import Any

_THOUGHTS = re.compile(
    r"<(/?)(?:\w+:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad)>"
    r"|\[(/?)think\]|◁(/?)think▷",
    re.IGNORECASE,
)
_EMPHASIS = re.compile(r"[*_`#|()\[\]{}]|\\boxed")
_QUOTED_END = re.compile(r"^[\"'“](.*)[\"'”]\s*\Z", re.MULTILINE)

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_BARE = re.compile(rf"\s?({_NUMBER})\s?(?:points?)?\s?[.!]?\s?", re.IGNORECASE)
_LABELLED = re.compile(
    r"(?:^|(?<=[.!?;。]\s))\s?(?:[-–•]\s)?"  # where a line or a sentence begins
    r"[\"']?(?:(?:an?|my|the|your|its|final|overall|total)\s)*(?:score|rating|grade)[\"']?\s?(?:is\b|of\b)?\s?[:：=]?\s?"
    rf"({_NUMBER})\s?(?:points?)?"
    r"(?=\s?(?:$|[.!;,。]\s?$|[.!;。]\s[^\d\s]))",  # and where it ends
    re.IGNORECASE | re.MULTILINE,
)

# What makes the number of one's own pattern a part of something else: another digit, a range, the end of a fraction.
_RUNS_INTO = re.compile(r"(?:\d[.,]?|\d[ \t]*[-–—/][ \t]*|(?:^|[\s:=])[-−–])\Z")
_RUNS_ON = re.compile(r"\d|[.,]\d|[ \t]*%|[ \t]*(?:[-–—/]|to\b|or\b|of\b|out of\b)[ \t]*\d")
# What names a score in an object of JSON, and the end of its scale.
_NAME = re.compile(r"(?:(?:my|the|final|overall|total)[ _-]?)*(?:score|rating|grade)", re.IGNORECASE)
_TOP = re.compile(r"(?:max(?:imum)?|out[ _-]?of|scale|highest)(?:[ _-]?(?:score|rating|grade|points))?", re.IGNORECASE)


class _Pairs(list):
    """An object of JSON as it is written; a dict would keep the last of two scores."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs)


def verdict(reply: str, lowest: float, highest: float, pattern: str | None = None) -> float:
    """The score in a reply, from `lowest` to `highest`.

    Args:
        pattern: regular expression with one group, the number. Default: the forms at the top of this file.

    Raises:
        ValueError: none, several, or one that is not on the scale; the message says which.
    """
    said = spoken(reply)
    found = _by_form(said, lowest, highest) if pattern is None else _by_pattern(said, lowest, highest, pattern)
    if not found:
        raise ValueError("the judge's reply holds no score")
    if len(found) > 1:
        raise ValueError("the judge's reply holds several scores")
    (value,) = found
    if not lowest <= value <= highest:
        raise ValueError("the judge's score is not on its scale")
    return value


def spoken(reply: str) -> str:
    """The reply without what the model thought; some servers leave out the mark that opens the thoughts.

    Raises:
        ValueError: the thoughts never end, so there is no reply.
    """
    said: list[str] = []
    start, thinks = 0, False
    for mark in _THOUGHTS.finditer(reply):
        if "/" in mark.groups():
            said = said if thinks else []
            start, thinks = mark.end(), False
        elif not thinks:
            said.append(reply[start : mark.start()])
            thinks = True
    if thinks:
        raise ValueError("the judge's reply ends inside its thoughts")
    return "".join([*said, reply[start:]])


def _by_form(text: str, lowest: float, highest: float) -> set[float]:
    text, in_objects = _without_objects(text, lowest, highest)
    return in_objects | _by_words(text, lowest, highest)


def _without_objects(text: str, lowest: float, highest: float) -> tuple[str, set[float]]:
    """(the text without its objects of JSON that name a score, these scores)."""
    rest, found, end = [], set(), 0
    for start in (match.start() for match in re.finditer(r"\{", text)):
        if start < end:
            continue
        try:
            content, after = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if (scores := _scores_of(content, lowest, highest)) is not None:
            rest.append(text[end:start])
            found |= scores
            end = after
    return "".join([*rest, text[end:]]), found


def _scores_of(content: _Pairs, lowest: float, highest: float) -> set[float] | None:
    """Those that stand outermost in an object, none beside another scale; None: it names no score."""
    level: list[Any] = [content]
    while level:
        pairs = [pair for value in level if isinstance(value, _Pairs) for pair in value]
        named = [value for name, value in pairs if _NAME.fullmatch(name) and not isinstance(value, list)]
        if named:
            tops = [value for name, value in pairs if _TOP.fullmatch(name) and not isinstance(value, list)]
            if any(_without_scale(f"1 of {value}", lowest, highest).strip() != "1" for value in tops):
                return set()
            return {number for value in named for number in _by_words(f"{value}", lowest, highest)}
        level = [value for _, value in pairs] + [part for value in level if type(value) is list for part in value]
    return None


def _by_words(text: str, lowest: float, highest: float) -> set[float]:
    text = _single_spaced(_EMPHASIS.sub(" ", text))
    text = _single_spaced(_without_scale(text, lowest, highest))
    text = _QUOTED_END.sub(r"\1", text)
    bare = _BARE.fullmatch(text)
    return {float(match[1]) for match in ([bare] if bare else _LABELLED.finditer(text))}


def _single_spaced(text: str) -> str:
    """The lines that say something; their regular expressions need not look for more than one space."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(filter(None, lines))


def _by_pattern(text: str, lowest: float, highest: float, pattern: str) -> set[float]:
    found = set()
    for match in re.finditer(pattern, text):
        if not re.fullmatch(_NUMBER, match[1] or ""):
            raise ValueError("the judge's score is not a number")
        rest = _without_scale(_EMPHASIS.sub(" ", f" {text[match.end(1) :]}"), lowest, highest)[1:]
        if _RUNS_INTO.search(text[: match.start(1)]) or _RUNS_ON.match(rest):
            raise ValueError("the judge's score is a part of a longer number, a range or another scale")
        found.add(float(match[1]))
    return found


def _without_scale(text: str, lowest: float, highest: float) -> str:
    """The text without its mentions of this scale; one of another scale stays, and no form has a place for it."""
    low, high = (re.escape(f"{end:.12g}") for end in (lowest, highest))
    top = rf"{high}(?:\.0+)?(?![.,]?\d)"
    named = rf"(?:on a )?(?:scale )?(?:of |from )?(?<![\w.,/-]){low}\s?(?:-|–|—|to)\s?{top}"
    return re.sub(rf"\s?(?:{named}|(?<=[\d\s])(?:/|out of|of)\s?{top})", " ", text, flags=re.IGNORECASE)
