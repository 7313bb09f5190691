"""A small OpenAI-compatible server on loopback that misbehaves as it is told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[dict, int], "dict | str | tuple[int, dict | str] | tuple[int, dict | str, dict]"]


def completion(text: Any, finish_reason: str | None = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def said(body: dict) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]


def echo(body: dict, attempt: int) -> dict:
    """The ordinary server: another answer for each seed."""
    return completion(f"{said(body)} {body.get('seed')}")


class ScriptedServer:
    """`script(body, attempt)`: the reply, or (status, reply, headers), to the attempt-th request (from 0) of a body
    that is the same but for its seed."""

    def __init__(self, script: Script):
        self.script = script
        self.bodies: list[dict] = []
        self.keys: list[str] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.most_at_once = self._now = 0
        self.released = threading.Event()  # ends whatever hangs
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def hang(self) -> dict:
        """For scripts: a reply that does not come while the test runs."""
        self.released.wait(60)
        return completion("too late")

    def asked(self) -> Counter[str]:
        return Counter(said(body) for body in self.bodies)

    def _answer(self, body: dict, headers: dict) -> tuple:
        with self._lock:
            same = json.dumps({name: value for name, value in body.items() if name != "seed"}, sort_keys=True)
            attempt = self._attempts[same]
            self._attempts[same] += 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.keys.append(headers.get("authorization", "").removeprefix("Bearer "))
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.script(body, attempt)
        finally:
            with self._lock:
                self._now -= 1
        return reply if isinstance(reply, tuple) else (200, reply)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, reply, *more = server._answer(body, headers)
                raw = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    for name, value in {"content-type": "application/json", **(more[0] if more else {})}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except ConnectionError:  # the client has given up waiting
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def serving(script: Script = echo):
    server = ScriptedServer(script)
    threading.Thread(target=server._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server._http.shutdown()
        server._http.server_close()
