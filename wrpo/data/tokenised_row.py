"""What a tokenised row must be before it is trained on; the errors name it by its place in the batch.

prompt_ids [P], response_ids R x [R_k]     token ids
role [R]                                   source, target or rejected; at least one rejected and one other
share [R]                                  > 0; those of each role sum to 1
ref_logp [R], source_logp [R][M]           where they are asked for
"""

from __future__ import annotations

import math

from wrpo.rows.errors import DataError, shown

from .roles import REJECTED, ROLES

COLUMNS = ("prompt_ids", "response_ids", "role", "share")
TOLERANCE = 1e-4  # what ten shares written with five decimals can miss 1 by


def check_row(row: dict, number: int) -> None:
    """Raises DataError for a row that is no prompt with preferred and rejected responses."""
    problem = _problem(row)
    if problem is not None:
        field, expected, got = problem
        todo = "Make the rows with wrpo.data.tokenize_examples, at stage preference."
        raise DataError(expected, got, todo, field=field, file="batch", row=number)


def _problem(row: dict) -> tuple[str, str, str] | None:
    """(field, what was expected, what came)."""
    lacking = [name for name in COLUMNS if row.get(name) is None]
    if lacking:
        return lacking[0], "a value", f"none beside {', '.join(map(str, row))}"
    count, roles, shares = len(row["response_ids"]), row["role"], row["share"]
    if len(roles) != count or not set(roles) <= set(ROLES):
        return "role", f"{count} of {', '.join(ROLES)}, one of each response", shown(roles)
    if REJECTED not in roles or set(roles) == {REJECTED}:
        return "role", "a rejected response and a preferred one", shown(roles)
    if len(shares) != count or not all(share > 0 for share in shares):
        return "share", f"{count} shares > 0, one of each response", shown(shares)
    for role in set(roles):
        total = math.fsum(share for share, own in zip(shares, roles, strict=True) if own == role)
        if abs(total - 1) > TOLERANCE:
            return "share", f"shares of {role} responses that sum to 1", f"{shown(shares)}, sum {total:g}"
    return None


def refuse_empty(row: dict, number: int) -> None:
    for place, ids in enumerate(row["response_ids"]):
        if len(ids) <= (not row["prompt_ids"]):
            raise DataError(
                "a response with a token to count",
                f"{ids} after the prompt_ids {shown(row['prompt_ids'])}",
                "Drop the row, or leave such rows out of the loss with empty_response='zero'.",
                field=f"response_ids[{place}]", file="batch", row=number,
            )  # fmt: skip


def reference_logp(row: dict, number: int) -> list[float]:
    values, expected = row.get("ref_logp"), len(row["response_ids"])
    if values is None or len(values) != expected or not all(map(math.isfinite, values)):
        raise DataError(
            f"{expected} finite log-probs, one of each response ({', '.join(row['role'])})",
            "none" if values is None else f"{len(values)}: {shown(values)}",
            "Make the column again from these rows, or remove it from all.",
            field="ref_logp", file="batch", row=number,
        )  # fmt: skip
    return values


def source_logp(row: dict, number: int, models: int) -> list[list[float]]:
    values, expected = row.get("source_logp"), len(row["response_ids"])
    if values is None or len(values) != expected or {len(value) for value in values} != {models}:
        raise DataError(
            f"{expected} lists of {models or 'some'} log-probs, one list of each response ({', '.join(row['role'])})",
            shown(values),
            "Make the column with `wrpo logp`, from all rows and by the same models.",
            field="source_logp", file="batch", row=number,
        )  # fmt: skip
    return values
