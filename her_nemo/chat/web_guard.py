"""Keeps foreign pages and other users of this machine away from a local page.

A page of another site can make the browser send requests here; a name of its own that resolves to 127.0.0.1 can even
make them look like ours (DNS rebinding). So the Host must be one this server is known by, the Origin, where the browser
sends one, must be this server's, and every call of the API must carry the token that was printed at the start, which
also keeps out whoever else is logged in on the machine.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

from her_nemo.chat.client import is_loopback

Asgi = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]
TOKEN_HEADER = "x-her-nemo-token"
# The page needs nothing from elsewhere, and nobody may put it into a frame.
HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def known_hosts(host: str, port: int) -> frozenset[str]:
    """The Host headers that mean this server."""
    names = {f"[{host}]" if ":" in host else host}
    if is_loopback(host):
        names |= {"127.0.0.1", "localhost", "[::1]"}
    return frozenset(f"{name.lower()}{end}" for name in names for end in ([f":{port}"] + ([""] if port == 80 else [])))


def refusal(
    headers: Mapping[str, str], path: str, hosts: frozenset[str], token: str, public: Collection[str] = ()
) -> tuple[int, str] | None:
    """Why a request is not answered, as status and reason; None where it is.

    Args:
        headers: names in lower case.
        hosts: from `known_hosts`.
        public: paths that are served without the token: the page itself, in which there is nothing to see.
    """
    host = headers.get("host", "").lower()
    if host not in hosts:
        return 403, f"this server is not known as {host!r}"
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in {f"http://{known}" for known in hosts}:
        return 403, "a page of another site may not talk to this server"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and path != "/":
        return 403, "a page of another site may not talk to this server"
    if path not in public:
        given = headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), token.encode()):
            return 401, "the address that her-nemo printed holds a token, and this page came without it"
    return None


class Guard:
    """An ASGI application in front of another: refuses what `refusal` says, and adds `HEADERS` to every answer."""

    def __init__(self, app: Asgi, hosts: frozenset[str], token: str, public: Collection[str]) -> None:
        self.app, self.hosts, self.token, self.public = app, hosts, token, public

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return  # no websockets here: uvicorn refuses what is not accepted
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        refused = refusal(headers, scope["path"], self.hosts, self.token, self.public)
        if refused is not None:
            status, reason = refused
            body = json.dumps({"error": reason}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": kind + extra})
            await send({"type": "http.response.body", "body": body})
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await self.app(scope, receive, with_headers)
