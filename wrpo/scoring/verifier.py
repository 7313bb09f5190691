"""A Python function as the reward: `function(prompt, response)`, a number, a higher one for a better answer.

The prompt is its text, or the list of messages where it is a conversation. A function with a parameter named `row`
gets the candidate's whole row in it, e.g. for the right answer that `wrpo sample --keep answer` carried on.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wrpo.user_error import UserError, in_one_line

from .candidates import Candidate
from .scoring import Rewards


class Verifier:
    """The function that `module:function` names; the current folder is searched first.

    Raises:
        UserError: no such module or function, or one that cannot be called with a prompt and a response.
    """

    def __init__(self, name: str):
        self.name = name
        self._function = find_function(name)
        try:
            parameters = inspect.signature(self._function).parameters
            self._takes_row = "row" in parameters
            inspect.signature(self._function).bind("", "", **({"row": {}} if self._takes_row else {}))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name}: expected a function of (prompt, response) or (prompt, response, row): {error}"
            ) from error

    def score(self, candidates: Iterator[Candidate], rewards: Rewards) -> None:
        for candidate in candidates:
            try:
                reward = self(candidate)
            except (Exception, SystemExit) as error:  # somebody's code raises what it likes
                rewards.fail(candidate, f"raised {in_one_line(error)}", is_scorers=not rewards.has_any)
            else:
                rewards.add(candidate, reward)

    def __call__(self, candidate: Candidate) -> float:
        """Raises TypeError for a result that is no number."""
        more = {"row": dict(candidate.fields)} if self._takes_row else {}
        reward = self._function(candidate.asked.prompt, candidate.response, **more)
        if isinstance(reward, (str, bytes)) or not hasattr(reward, "__float__"):
            raise TypeError(f"expected a number from {self.name}, got {reward!r}")
        return float(reward)


def find_function(name: str) -> Callable[..., Any]:
    """The object that `module:function` names."""
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UserError(f"{name!r}: expected module:function, for example my_rewards:exact_match")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # somebody's code raises what it likes
        raise UserError(f"{name}: the module cannot be imported from {Path.cwd()}: {in_one_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"{name}: {module_name} has no {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name}: expected a function, got {type(found).__name__}")
    return found
