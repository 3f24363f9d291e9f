"""An OpenAI-compatible server on a real socket that answers as a test tells it to, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# limits.* that do not make a test wait.
QUICK = {"backoff_seconds": 0.01, "timeout_seconds": 5.0, "retries": 3, "concurrency": 4}


@dataclass
class Reply:
    """What the server does with one request: an answer, or a fault."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    raw: bytes | None = None  # this body instead of a completion
    hang_up: bool = False  # close the connection without an answer
    reasoning: str | None = None
    finish_reason: str = "stop"
    usage: bool = True
    refusal: str | None = None
    embeddings: list[list[float]] | None = None


Script = Callable[[dict[str, Any], int], Reply]


class ScriptedEndpoint:
    """`with ScriptedEndpoint(script) as server:`; `server.url`, `server.requests` (bodies, in order of arrival)."""

    def __init__(self, script: Script, *, models: list[dict[str, Any]] | None = None) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                if models is None:
                    self.answer(404, {"error": {"message": "no list here"}})
                else:
                    self.answer(200, {"object": "list", "data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint._lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.times.append(time.monotonic())
                    endpoint.headers.append(dict(self.headers))
                    endpoint._at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._at_once)
                try:
                    self.reply(body, endpoint.script(body, number))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client did not wait
                finally:
                    with endpoint._lock:
                        endpoint._at_once -= 1

            def reply(self, body: dict[str, Any], reply: Reply) -> None:
                time.sleep(reply.delay)
                if reply.hang_up:
                    self.close_connection = True
                    return
                if reply.raw is not None:
                    self.send(reply.status, reply.raw, reply.headers)
                elif reply.status != 200:
                    self.answer(reply.status, {"error": {"message": reply.text or "scripted"}}, reply.headers)
                elif reply.embeddings is not None:
                    rows = [{"index": i, "embedding": row} for i, row in enumerate(reply.embeddings)]
                    self.answer(200, {"data": rows[::-1]})
                else:
                    self.answer(200, completion(body, reply), reply.headers)

            def answer(
                self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
            ) -> None:
                self.send(status, json.dumps(body).encode(), headers or {})

            def send(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> ScriptedEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """The body of a chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.reasoning is not None:
        message["reasoning_content"] = reply.reasoning
    if reply.refusal is not None:
        message |= {"content": None, "refusal": reply.refusal}
    done: dict[str, Any] = {
        "id": "scripted",
        "object": "chat.completion",
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
    }
    if reply.usage:
        words = sum(len(message["content"].split()) for message in body["messages"])
        done["usage"] = {"prompt_tokens": words, "completion_tokens": len(reply.text.split())}
    return done


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedEndpoint]]:
    """Starts scripted servers, stopped when the test ends."""
    running: list[ScriptedEndpoint] = []

    def start(script: Script, **options: Any) -> ScriptedEndpoint:
        running.append(ScriptedEndpoint(script, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()
