"""What is wrong with a row, and where: one error class, one counter of skipped rows.

A bad row either stops the load with a `DataError` that names file, row and field, or is skipped and counted; `BadRows`
makes that choice in one place, so that nothing is ever dropped without appearing in the final report.
"""

from __future__ import annotations

from collections import Counter

from wrpo.user_error import UserError


class DataError(UserError):
    """A row that cannot be used.

    Attributes:
        expected, got, todo: the sentence's parts: what was expected, what came, what to do about it.
        field: name of the field, e.g. `chosen[1]`; None when the whole row is at fault.
        file, row: where it stands; `row` counts from 1 (the line number for JSON lines), None when unknown.
    """

    def __init__(
        self,
        expected: str,
        got: object,
        todo: str,
        *,
        field: str | None = None,
        file: str | None = None,
        row: int | None = None,
    ):
        self.expected, self.got, self.todo = expected, got, todo
        self.field, self.file, self.row = field, file, row
        place = [file, row and f"row {row}", field and f"field '{field}'"]
        where = ", ".join(part for part in place if part)
        super().__init__(f"{where + ': ' if where else ''}expected {expected}, got {got}. {todo}")

    def at(self, file: str | None, row: int | None) -> DataError:
        """The same error with its place in the data."""
        return DataError(self.expected, self.got, self.todo, field=self.field, file=file, row=row)

    def __reduce__(self):
        # Exceptions cross process borders by pickle, which knows nothing of keyword arguments.
        return _rebuild, (self.expected, self.got, self.todo, self.field, self.file, self.row)


def _rebuild(expected, got, todo, field, file, row):
    return DataError(expected, got, todo, field=field, file=file, row=row)


def shown(value: object, limit: int = 60) -> str:
    """`repr` of a value from the data, cut to a length that fits in a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # lists in lists, or a number of thousands of digits
        text = f"{type(value).__name__} that is too deep or too long to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class BadRows:
    """Raises the first bad row, or counts them all when `skip` is true."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.fields: Counter[str] = Counter()
        self.first = ""

    @property
    def count(self) -> int:
        return self.fields.total()

    def add(self, error: DataError) -> None:
        if not self.skip:
            raise error
        self.note(error.field, str(error))

    def note(self, field: str | None, message: str) -> None:
        """Count a bad row of which only the words are left."""
        self.fields[field or "whole row"] += 1
        self.first = self.first or message

    def report(self) -> str:
        """One clause, e.g. `2 bad rows skipped (rejected 1, whole row 1; first: data.jsonl, row 3, ...)`."""
        if not self.count:
            return "no bad rows"
        fields = ", ".join(f"{name} {count}" for name, count in self.fields.most_common())
        return f"{self.count} bad row{'s' * (self.count > 1)} skipped ({fields}; first: {self.first})"
