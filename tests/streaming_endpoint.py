"""An OpenAI-compatible endpoint over real sockets that streams what a script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = (
    "<system_thinking>Pia Penn pries. Kit Holt is calm.</system_thinking>Kit Holt: <role_thinking>I hide the mask."
    "</role_thinking> <role_action>nods</role_action> Listen, the drum is mine."
)


@dataclass
class Reply:
    """What is answered to one request.

    Attributes:
        text: streamed in pieces of `size` signs, `seconds` apart.
        status: another than 200 is a refusal with `text` as its message.
        finish: the finish_reason; None breaks off before it.
        broken: raw bytes sent instead of the pieces.
    """

    text: str = GOOD
    size: int = 7
    seconds: float = 0.0
    status: int = 200
    finish: str | None = "stop"
    broken: bytes = b""


Script = Callable[[Mapping[str, Any], int], Reply]


class StreamingEndpoint:
    """`with StreamingEndpoint(script) as server`: `server.url`, `server.requests`, `server.hung_up`."""

    def __init__(self, script: Script | Reply | None = None, models: Sequence[str] = ("tiny",)) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.hung_up = threading.Event()  # a client closed the connection in the middle of a reply
        self.script: Script = script if callable(script) else lambda request, number: script or Reply()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Tests have their own output."""

            def do_GET(self) -> None:
                body = json.dumps({"data": [{"id": name} for name in models]}).encode()
                self.whole(200, body)

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                reply = outer.script(request, len(outer.requests) - 1)
                if reply.status != 200:
                    self.whole(reply.status, json.dumps({"error": {"message": reply.text}}).encode())
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    self.stream(reply)
                except OSError:
                    outer.hung_up.set()

            def stream(self, reply: Reply) -> None:
                if reply.broken:
                    self.wfile.write(reply.broken)
                    return
                self.event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
                for start in range(0, len(reply.text), reply.size):
                    time.sleep(reply.seconds)
                    piece = reply.text[start : start + reply.size]
                    self.event({"delta": {"content": piece}, "finish_reason": None})
                if reply.finish:
                    self.event({"delta": {"content": ""}, "finish_reason": reply.finish})
                    self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\ndata: [DONE]\n\n')

            def event(self, choice: dict[str, Any]) -> None:
                body = {"choices": [{"index": 0, **choice}]}
                self.wfile.write(f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode())
                self.wfile.flush()

            def whole(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> StreamingEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
