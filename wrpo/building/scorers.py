"""Whose rewards a build compares: those of one scorer, or of several whose scales somebody says are one."""

from __future__ import annotations

from wrpo.rows.candidate import scorer_of
from wrpo.user_error import UserError

ANY = "any"
OF_ANOTHER = "rewarded by another scorer"


class Scorers:
    """`takes(row, file, number)` for one candidate after another.

    Args:
        wanted: the scorer whose rewards are taken; "any": all; None: the one that all rows have.
    """

    def __init__(self, wanted: str | None):
        self._wanted = wanted
        self._first: tuple[str | None, str] | None = None  # the first scorer, and where it stands

    def takes(self, row: dict, file: str, number: int) -> bool:
        """Whether the row's reward is of the scorer that is wanted.

        Raises:
            UserError: a second scorer, where none is wanted by name.  DataError: a scorer that is no name.
        """
        name = scorer_of(row)
        if self._wanted is not None:
            return self._wanted in (name, ANY)
        if self._first is None:
            self._first = name, f"{file}, row {number}"
        if name != self._first[0]:
            raise UserError(
                f"{file}, row {number}, field 'scorer': expected {_named(self._first[0])}, as in {self._first[1]}, got "
                f"{_named(name)}. Rewards of two scorers are no one scale: score all answers with one, take one with "
                "--scorer NAME, or say --scorer any if the scales are one."
            )
        return True


def _named(scorer: str | None) -> str:
    return "no scorer" if scorer is None else repr(scorer)
