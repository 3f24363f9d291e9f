"""One OpenAI-compatible endpoint over HTTP: rate limits, retries with backoff, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, TypeVar

import httpx

from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.errors import UserError

Read = TypeVar("Read")

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
# Wrong for every request alike: going on would fail every unit one by one.
FATAL = {
    401: "the endpoint wants a key: set api_key_env to the environment variable that holds it",
    403: "the endpoint refuses this key or model",
    404: "no such path or model: endpoint is the base URL (it ends in /v1), model a name the endpoint lists",
}


class EndpointFailure(Exception):
    """A request that failed for good; other requests may still succeed. `kind` is what is counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Completion:
    """One answer. Token counts are None where the endpoint does not say; `refusal` is what it says instead."""

    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    refusal: str = ""


class RateLimiter:
    """Lets `per_minute` units through each minute, evenly spaced, in the order they are asked for."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._free_at = 0.0

    async def acquire(self, amount: float = 1.0) -> None:
        """Waits for `amount` units."""
        if self.per_minute is None:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + amount * 60.0 / self.per_minute
        if start > now:
            await asyncio.sleep(start - now)

    def correct(self, difference: float) -> None:
        """More (or, below zero, fewer) units than acquired were used in the end."""
        if self.per_minute is not None:
            self._free_at += difference * 60.0 / self.per_minute


class Endpoint:
    """`async with Endpoint(...)`: chat completions, embeddings, and what the endpoint says of its models."""

    def __init__(self, base_url: str, limits: RequestLimits, api_key_env: str | None = None) -> None:
        """
        Raises:
            UserError: if the URL is not one, or the key's variable is not set.
        """
        self.base_url = base_url.rstrip("/")
        if httpx.URL(self.base_url).scheme not in ("http", "https"):
            raise UserError(f"endpoint={base_url}: give a base URL such as http://localhost:8000/v1")
        headers = {}
        if api_key_env:
            key = os.environ.get(api_key_env)
            if not key:
                raise UserError(f"api_key_env={api_key_env}: this environment variable is not set")
            headers["Authorization"] = f"Bearer {key}"
        self.limits = limits
        self.retries = 0  # requests sent again
        self.requests = 0
        self._in_a_row = 0  # requests that failed for good since the last one that did not
        self._requests_limit = RateLimiter(limits.requests_per_minute)
        self._tokens_limit = RateLimiter(limits.tokens_per_minute)
        self._paused_until = 0.0
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._client = httpx.AsyncClient(
            headers=headers,
            # No waiting for a free connection is timed: the slots see to it that there is one.
            timeout=httpx.Timeout(
                limits.timeout_seconds, connect=min(30.0, limits.timeout_seconds), pool=None
            ),
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def identity(self, model: str) -> dict[str, str]:
        """What tells this model from others of the same name, for the cache key.

        A local server may serve any directory under any name; vLLM says which (`root`). Where the endpoint does
        not, its address stands in.
        """
        for entry in await self._listed():
            if entry.get("id") == model and isinstance(entry.get("root"), str):
                return {"model": model, "root": entry["root"]}
        return {"model": model, "endpoint": self.base_url}

    async def models(self) -> list[str]:
        """The names of the models that the endpoint lists; none where it has no list."""
        return [entry["id"] for entry in await self._listed() if isinstance(entry.get("id"), str)]

    async def _listed(self) -> list[dict[str, Any]]:
        try:
            listed = await self._send("GET", "/models", None, 0.0, lambda body: body["data"])
        except EndpointFailure as failure:
            if not failure.kind.startswith("http_4"):
                raise UserError(f"{self.base_url}/models: {failure}. Is the server up?") from failure
            return []  # not every endpoint lists its models
        return [entry for entry in listed if isinstance(entry, dict)]

    async def complete(self, request: Mapping[str, Any]) -> Completion:
        """One chat completion. Raises EndpointFailure, or UserError where going on makes no sense."""
        characters = sum(len(message["content"]) for message in request["messages"])
        estimate = characters / 4 + request.get("max_tokens", 0)
        completion = await self._send("POST", "/chat/completions", request, estimate, _completion)
        if completion.prompt_tokens is not None and completion.completion_tokens is not None:
            used = completion.prompt_tokens + completion.completion_tokens
            self._tokens_limit.correct(used - estimate)
        return completion

    async def embed(self, model: str, texts: list[str]) -> list[list[float]]:
        """One vector per text, in order."""

        def read(body: dict[str, Any]) -> list[list[float]]:
            rows = sorted(body["data"], key=lambda row: row["index"])
            if len(rows) != len(texts):
                raise ValueError(f"{len(rows)} embeddings for {len(texts)} texts")
            return [[float(value) for value in row["embedding"]] for row in rows]

        estimate = sum(len(text) for text in texts) / 4
        return await self._send("POST", "/embeddings", {"model": model, "input": texts}, estimate, read)

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        tokens: float,
        read: Callable[[dict[str, Any]], Read],
    ) -> Read:
        """Sends until it is answered or the retries are spent."""
        failure = EndpointFailure("none", "")
        for attempt in range(self.limits.retries + 1):
            if attempt:
                self.retries += 1
            wait = 0.0
            try:
                async with self._slots:
                    # In here, so that no more is reserved than is about to be sent.
                    await self._requests_limit.acquire()
                    await self._tokens_limit.acquire(tokens)
                    while (pause := self._paused_until - time.monotonic()) > 0:
                        await asyncio.sleep(pause)
                    self.requests += 1
                    response = await self._client.request(method, self.base_url + path, json=body)
                    if response.is_success:
                        answer = read(response.json())
                        self._in_a_row = 0
                        return answer
                    failure, wait = self._refused(response)
            except httpx.TimeoutException:
                failure = EndpointFailure("timeout", f"no answer in {self.limits.timeout_seconds:g} s")
            except (httpx.TransportError, httpx.DecodingError) as error:
                failure = EndpointFailure("connection", f"{type(error).__name__}: {error}".rstrip(": "))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                # json.JSONDecodeError is a ValueError.
                failure = EndpointFailure(
                    "bad_body", f"not an OpenAI answer: {type(error).__name__}: {error}"
                )
            if attempt < self.limits.retries:
                await asyncio.sleep(max(wait, self._backoff(attempt)))
        self._count_failure(method, path, failure)
        raise failure

    def _backoff(self, attempt: int) -> float:
        """Exponential, with jitter between half and whole so that clients do not come back in step."""
        longest = min(self.limits.backoff_seconds * 2**attempt, self.limits.max_backoff_seconds)
        return longest * random.uniform(0.5, 1.0)

    def _refused(self, response: httpx.Response) -> tuple[EndpointFailure, float]:
        """The failure of an HTTP error that is worth a retry, and how long to wait. Raises for all others."""
        status = response.status_code
        said = _message(response)
        if status in FATAL and response.request.url.path.endswith(("/chat/completions", "/embeddings")):
            raise UserError(f"{response.request.url}: HTTP {status}: {said}. {FATAL[status]}")
        failure = EndpointFailure(f"http_{status}", f"HTTP {status}: {said}")
        if status not in RETRIED:
            self._in_a_row = 0  # the endpoint is well, the request is not
            raise failure
        wait = min(_retry_after(response), self.limits.max_backoff_seconds * 10)
        if status == 429 and wait:
            self._paused_until = max(self._paused_until, time.monotonic() + wait)
        return failure, wait

    def _count_failure(self, method: str, path: str, failure: EndpointFailure) -> None:
        if method == "GET":
            return
        self._in_a_row += 1
        if self._in_a_row >= self.limits.give_up_after:
            raise UserError(
                f"{self.base_url}{path}: {self._in_a_row} requests in a row failed, each tried "
                f"{self.limits.retries + 1} times; the last: {failure}. Is the server up? Answers so far are "
                "kept: the same command goes on from there"
            ) from failure


def _completion(body: dict[str, Any]) -> Completion:
    choice = body["choices"][0]
    message, usage = choice["message"], body.get("usage") or {}
    text = message.get("content") or ""
    # vLLM and DeepSeek say reasoning_content, newer servers reasoning; others leave <think> in the text.
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(text, str) or not isinstance(reasoning, str):
        raise ValueError("message.content is not text")
    thought = re.match(r"\s*<think>(.*?)</think>", text, re.DOTALL)
    if thought:
        reasoning, text = reasoning or thought.group(1), text[thought.end() :]
    return Completion(
        text=text,
        reasoning=reasoning.strip(),
        finish_reason=choice.get("finish_reason") or "",
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        refusal=message.get("refusal") or "",
    )


def _message(response: httpx.Response) -> str:
    """What the server says went wrong, in one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        said = error.get("message", error) if isinstance(error, dict) else error
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        said = response.text
    line = " ".join(str(said).split())
    return line[:300] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    """Seconds of the Retry-After header (a number or a date), 0 without one."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return 0.0
