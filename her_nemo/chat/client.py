"""One model behind an OpenAI-compatible API, its replies streamed (server-sent events)."""

from __future__ import annotations

import codecs
import ipaddress
import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from her_nemo.config.chat import ReplySampling
from her_nemo.config.errors import UserError
from her_nemo.roleplay.prompt import Message

CONNECT_SECONDS = 10.0
_KEPT_OF_A_REFUSAL = 400
# What servers say of a prompt that does not fit: vLLM, OpenAI and its likes.
_TOO_LONG = re.compile(
    r"maximum context length|context[_ ](?:length|window)|prompt is too long|too many tokens", re.IGNORECASE
)


class PromptTooLong(UserError):
    """The server says that prompt and reply do not fit into the model."""


@dataclass
class Piece:
    """What came: the reply so far. `finish_reason` is set in the last piece: "stop", "length", ..."""

    text: str
    finish_reason: str | None = None


class ChatClient:
    """`async with ChatClient(...)`: asks one model.

    Attributes:
        model: its name; None until `find_model` was called.
    """

    def __init__(
        self, endpoint: str, model: str | None, sampling: ReplySampling, timeout: float, api_key_env: str | None = None
    ) -> None:
        """
        Raises:
            UserError: the key's variable is not set.
        """
        self.endpoint = endpoint.rstrip("/")
        self.model = model
        self.sampling = sampling
        self.timeout = timeout
        headers = {}
        if api_key_env:
            key = os.environ.get(api_key_env)
            if not key:
                raise UserError(f"api_key_env={api_key_env}: this environment variable is not set")
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
            # A server of this machine is never reached through a proxy.
            trust_env=not is_loopback(httpx.URL(self.endpoint).host),
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def find_model(self, key: str) -> str:
        """The model's name: the one that was given, else the only one that the endpoint lists.

        Args:
            key: the configuration's key for the name, for errors.

        Raises:
            UserError: the endpoint does not answer, or lists none or several.
        """
        if self.model is None:
            names = await self._listed()
            if len(names) != 1:
                shown = ", ".join(names[:12]) or "none"
                raise UserError(f"{self.endpoint} lists {len(names)} models ({shown}): name one with {key}=NAME")
            self.model = names[0]
        return self.model

    async def _listed(self) -> list[str]:
        try:
            response = await self._http.get(f"{self.endpoint}/models")
            if not response.is_success:
                raise self._refusal(response.status_code, response.text)
            return [entry["id"] for entry in response.json()["data"] if isinstance(entry["id"], str)]
        except httpx.TransportError as error:
            raise self._lost(error) from error
        except (ValueError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.endpoint}/models: not an OpenAI answer ({what})") from error

    async def stream(self, messages: Sequence[Message], number: int = 0) -> AsyncIterator[Piece]:
        """One reply, piece by piece; each piece holds all of the text so far.

        Args:
            messages: the prompt.
            number: added to the seed, so that a second reply to one prompt is another one.

        Raises:
            PromptTooLong: it does not fit.
            UserError: the endpoint does not answer, refuses, or breaks off.
        """
        text = ""
        ended = False
        try:
            async with self._http.stream(
                "POST", f"{self.endpoint}/chat/completions", json=self._body(messages, number)
            ) as response:
                if not response.is_success:
                    raise self._refusal(response.status_code, (await response.aread()).decode("utf-8", "replace"))
                async for event in events(response.aiter_bytes()):
                    delta, reason = self._delta(event)
                    text += delta
                    if delta or reason:
                        yield Piece(text, reason)
                    ended = ended or reason is not None
        except httpx.TransportError as error:
            raise self._lost(error) from error
        if not ended:
            raise UserError(f"{self.endpoint} broke off in the middle of a reply")

    def _body(self, messages: Sequence[Message], number: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
        }
        if self.sampling.top_k:
            body["top_k"] = self.sampling.top_k  # no key of OpenAI's own: sent only where it is asked for
        if self.sampling.seed is not None:
            body["seed"] = self.sampling.seed + number
        return body

    def _delta(self, event: str) -> tuple[str, str | None]:
        """The text and the end that an event brings."""
        try:
            body = json.loads(event)
            if isinstance(body, dict) and "error" in body:
                raise UserError(f"{self.endpoint} stopped: {_said(event)}")
            choices = body["choices"]
            if not choices:
                return "", None  # the event that holds the counts of tokens
            delta = choices[0].get("delta") or {}
            return delta.get("content") or "", choices[0].get("finish_reason")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.endpoint}: not an OpenAI answer ({type(error).__name__}: {error}): {event[:120]}"
            ) from error

    def _refusal(self, status: int, text: str) -> UserError:
        said = _said(text)
        if status in (400, 413, 422) and _TOO_LONG.search(said):
            return PromptTooLong(f"{self.endpoint}: {said}")
        hints = {
            401: "; set api_key_env to the variable that holds the key",
            403: "; the key or the model is refused",
            404: "; the address ends in /v1, and model=NAME is one that it lists",
            429: "; wait a little",
        }
        return UserError(f"{self.endpoint} answered {status}: {said}{hints.get(status, '')}")

    def _lost(self, error: httpx.TransportError) -> UserError:
        if isinstance(error, httpx.TimeoutException):
            return UserError(f"{self.endpoint}: no answer in {self.timeout:g} s (timeout_seconds)")
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        return UserError(f"{self.endpoint} cannot be reached ({what}): is the server up?")


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of server-sent events, up to `[DONE]`. Lines end with \\n, \\r or both, and with no other sign."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    async for chunk in chunks:
        # A line separator of Unicode may stand inside a text: str.splitlines would cut there.
        lines = re.split(r"\r\n|\n|\r(?!\Z)", rest + decoder.decode(chunk))
        rest = lines.pop()
        for line in lines:
            if line.startswith("data:"):
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield data


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _said(text: str) -> str:
    """What a server says went wrong, in one line."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = text
    return " ".join(str(said).split())[:_KEPT_OF_A_REFUSAL] or "nothing"
