"""The part of the prompts that one machine of several takes: the same parts as those of `wrpo build --shard i/n`."""

from __future__ import annotations

from collections.abc import Callable

from wrpo.user_error import UserError

SEED = 42  # of `wrpo build` by default: the answers of shard i/n are then what its shard i/n reads


def in_shard(text: str | None) -> Callable[[str], bool]:
    """From "i/n", i from 0: whether the shard holds a prompt id; None is the whole.

    Raises:
        UserError: anything else, or i not in 0..n-1.
    """
    if text is None:
        return lambda prompt_id: True
    from wrpo.building.grouping import Shard, place  # seconds of imports that only this needs

    try:
        shard = Shard.parse(text)
    except ValueError as error:
        raise UserError(str(error)) from error
    return lambda prompt_id: shard.holds(place(prompt_id, SEED)[0])
