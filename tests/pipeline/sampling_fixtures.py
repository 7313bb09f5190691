"""`wrpo sample` run on sources and prompts that a test writes down; fixtures for `pytest_plugins`."""

from __future__ import annotations

import json
import os

import pytest

from wrpo import cli


@pytest.fixture
def nothing_between_us_and_loopback(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def sample(tmp_path, nothing_between_us_and_loopback):
    """Runs `wrpo sample` on sources given as dicts and prompts given as texts or rows; returns the exit status."""

    def run(sources: list[dict], prompts: list, *flags: str, output: str = "out.jsonl", more: str | None = None) -> int:
        settings = [{"kind": "server", "retry_wait": 0.01, "retries": 2, **source} for source in sources]
        (tmp_path / "sources.yaml").write_text(json.dumps(settings))  # JSON is YAML
        rows = [{"prompt_id": p, "prompt": p} if isinstance(p, str) else p for p in prompts]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [str(tmp_path / name) for name in ("sources.yaml", "prompts.jsonl")]
        files += [*([more] if more else []), "-o", str(tmp_path / output)]
        return cli.main(["sample", *files, *flags])

    return run


@pytest.fixture
def written(tmp_path):
    def read(name: str = "out.jsonl") -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_bytes().splitlines()]

    return read
