"""What tests of `wrpo sample` say of sources and of the rows that came of them."""

from __future__ import annotations

KEY = "sk-very-secret-0123456789"
FINE = {"model": "a", "base_url": "http://127.0.0.1:1/v1"}  # nobody listens there


def keys(rows: list[dict]) -> list[tuple]:
    return sorted((row["prompt_id"], row["model"], row["sample"]) for row in rows)
