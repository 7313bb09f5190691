"""The kind of error that the user can put right: the command line shows it as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in data, settings or surroundings, not in the program; the message says what to do."""
