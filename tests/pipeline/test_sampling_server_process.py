"""`wrpo sample` beside a real server, `transformers serve` with a tiny model, while either of the two is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

needs = ("fastapi", "uvicorn", "openai")
missing = [name for name in needs if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; `make test` installs them"),
]

PROMPTS = ["What is 2 + 3?", "Say hello.", "Name a colour.", "Is ice cold?"]
SAMPLES = 40  # more than are answered before either is killed
PATIENCE = 3000  # ticks of 0.1 s that any one step may take on a machine that is busy with other things


def quiet_environment() -> dict[str, str]:
    """One thread each for server and client, no proxy, no hub."""
    named = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return named | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def wait_for(process: subprocess.Popen, happened: Callable[[], bool], what: str) -> None:
    """Until something has happened that `process` does, and is alive to do."""
    for _ in range(PATIENCE):
        if happened():
            return
        try:
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
        assert happened(), f"the process ended with {process.returncode} before {what}"
        return
    raise AssertionError(f"no sign of {what}")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.do_sample = True  # the server draws only where the model's own settings do
    model.generation_config.suppress_tokens = tokenizer.all_special_ids  # no answer is empty
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Server:
    """`transformers serve` as a process; `start` again after `kill` serves the same port."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._log = model, log

    def start(self) -> None:
        program = Path(sys.executable).with_name("transformers")
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [program, "serve", self._model, *options], stdout=log, stderr=log, env=quiet_environment()
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def is_ready(self) -> bool:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def answered(self) -> int:
        return len(re.findall(r"POST /v1/chat/completions HTTP/1.1\" 200", self._log.read_text(errors="replace")))


@pytest.fixture
def server(model, tmp_path):
    server = Server(model, tmp_path / "server.log")
    server.start()
    yield server
    server.kill()


def test_answers_survive_the_death_of_the_server_and_of_the_client_each_exactly_once(server, model, tmp_path):
    source = {
        "model": "tiny",
        "kind": "server",
        "base_url": f"{server.url}/v1",
        "served_model": str(model),
        "concurrency": 2,
        "retries": 1000,
        "longest_retry_wait": 1,
    }
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump([source]))
    rows = [{"prompt_id": f"p{n}", "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "wrpo", "sample", "sources.yaml", "prompts.jsonl", "-o", str(out)]
    command += ["--samples", str(SAMPLES), "--max-tokens", "4"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=quiet_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    first = start()  # while the server is still loading: that is one more outage
    wait_for(first, lambda: lines() >= 2, "two answers")
    server.kill()
    before = lines()
    server.start()
    wait_for(first, lambda: lines() >= before + 2, "answers of the restarted server")
    first.kill()
    first.communicate()
    held = lines()
    assert held < len(PROMPTS) * SAMPLES, "the client was killed when all was done: nothing is tested"
    wait_for(server.process, server.is_ready, "the server's health")
    asked = server.answered()
    second = start()
    said, _ = second.communicate(timeout=PATIENCE / 10)
    assert second.returncode == 0, said
    answers = [json.loads(line) for line in out.read_bytes().splitlines()]
    keys = sorted((answer["prompt_id"], answer["sample"]) for answer in answers)
    assert keys == [(f"p{n}", sample) for n in range(len(PROMPTS)) for sample in range(SAMPLES)]
    assert all(answer["model"] == "tiny" and answer["response"].strip() for answer in answers)
    assert len({answer["response"] for answer in answers}) > len(PROMPTS), "the samples of a prompt differ"
    # A request that was in flight when the client died is answered by the server too.
    assert server.answered() - asked <= len(PROMPTS) * SAMPLES - held + 2
