"""Which of the known names somebody meant who mistyped one."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST_PART = 4  # letters of a name that still say which one is meant


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is a typing error away from `name`, or the only one that is a longer or shorter form of it.

    A typing error is a letter too many, missing, wrong or swapped with its neighbour; names of three letters and more
    may have one, and one more for every ten letters. None where nothing is near: a wrong suggestion is worse.
    """
    known = sorted(set(known) - {name})
    distances = {other: distance(name, other) for other in known if abs(len(other) - len(name)) <= errors(name)}
    if distances and min(distances.values()) <= errors(name):
        return min(distances, key=lambda other: distances[other])
    longer = [other for other in known if len(name) >= SHORTEST_PART and other.startswith(name)]
    shorter = [other for other in known if len(other) >= SHORTEST_PART and name.startswith(other)]
    return longer[0] if len(longer) == 1 else max(shorter, key=len, default=None)


def errors(name: str) -> int:
    return 1 + len(name) // 10 if len(name) > 2 else 0


def distance(one: str, other: str) -> int:
    """Fewest letters to add, drop, change or swap with their neighbour to get from one word to the other."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, to in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != to)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == to:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
