"""One vLLM rollout server over HTTP: samples, log-probs of given tokens, and the phases of a weight update.

Token ids go in and come out (`/inference/v1/generate`); nothing here tokenises. A server that cannot be counted
on any more raises `ServerLost`; one that refuses a request as wrong raises `UserError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from her_nemo.config.errors import UserError
from her_nemo.rollout.engine import Sampling

GENERATE = "/inference/v1/generate"
CONNECT_SECONDS = 5.0
CONTROL_SECONDS = 600.0  # a large model takes its time to load weights
# A server that does not answer /health this often in a row is lost, also when its connections stay open.
HEALTH_POLL_SECONDS, HEALTH_TIMEOUT_SECONDS, HEALTH_FAILURES = 3.0, 8.0, 3
CONNECTIONS_TRIED = 3
# Below vLLM's own 5 s: a connection that the server is about to close must not be used again.
KEEPALIVE_SECONDS = 2.0
_KEPT_OF_A_REPLY = 400


class ServerLost(RuntimeError):
    """A server that died, went silent or answers wrongly; its message says which and how."""


@dataclass(frozen=True)
class Answer:
    """One reply of a server."""

    token_ids: list[int]
    log_probs: list[float]
    finished: bool
    versions: set[str]


def check(url: str, response: httpx.Response) -> Any:
    """The JSON of a response.

    Raises:
        ServerLost: the server failed.
        UserError: it refused the request.
    """
    if response.status_code >= 500:
        raise ServerLost(f"{url} answered {response.status_code}: {response.text[:_KEPT_OF_A_REPLY]}")
    if response.status_code == 404:
        raise UserError(
            f"{url} has no {response.request.url.path}: start the server as `python -m her_nemo.rollout.vllm_server "
            "DIR` (VLLM_SERVER_DEV_MODE=1, --tokens-only)."
        )
    if response.status_code >= 400:
        raise UserError(f"{url} refused a request: {response.text[:_KEPT_OF_A_REPLY]}")
    return response.json() if response.content else None


def sampling_body(sampling: Sampling, seed: int, max_tokens: int, min_tokens: int) -> dict[str, Any]:
    """vLLM's SamplingParams for one sample."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "seed": seed,
        "logprobs": 0,
        "detokenize": False,
    }


def read_answer(url: str, body: dict[str, Any]) -> Answer:
    """A generate response as an Answer."""
    choice = body["choices"][0]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerLost(f"{url} ended a reply by {choice['finish_reason']!r}")
    content = (choice["logprobs"] or {}).get("content") or []
    ids = choice["token_ids"] or []
    if [entry["token_id"] for entry in content] != ids:
        raise ServerLost(f"{url} sent {len(content)} log-probs for {len(ids)} tokens")
    return Answer(
        token_ids=ids,
        log_probs=[entry["logprob"] for entry in content],
        finished=choice["finish_reason"] == "stop",
        versions={span["version"] for span in choice["weight_versions"] or []},
    )


class VllmServer:
    """Control of one server, call by call. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # trust_env=False: these are machines of this job, never to be reached through a proxy.
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(CONTROL_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
        )

    def __str__(self) -> str:
        return self.url

    def post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        """POST, with the answer's JSON."""
        try:
            return check(self.url, self._http.post(path, json=body, params=query or None))
        except httpx.TransportError as error:
            raise ServerLost(f"{self.url} {path}: {type(error).__name__} {error}".rstrip()) from error

    def get(self, path: str, timeout: float = CONTROL_SECONDS) -> Any:
        """GET, with the answer's JSON."""
        try:
            return check(self.url, self._http.get(path, timeout=timeout))
        except httpx.TransportError as error:
            raise ServerLost(f"{self.url} {path}: {type(error).__name__} {error}".rstrip()) from error

    def healthy(self) -> bool:
        """Whether it says it can serve."""
        try:
            return self._http.get("/health", timeout=HEALTH_TIMEOUT_SECONDS).is_success
        except httpx.TransportError:
            return False

    def world_size(self) -> int:
        """Workers of the server."""
        return int(self.get("/get_world_size")["world_size"])

    def workers(self, method: str) -> list[str]:
        """The answer of every worker to a method of `vllm_worker.WeightReceiver`."""
        return self.post("/collective_rpc", {"method": method})["results"]

    def log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob of each token but the first, given those before it, at temperature 1."""
        body = {
            "token_ids": list(token_ids),
            "sampling_params": {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
        }
        said = self.post(GENERATE, body)["prompt_logprobs"]
        return [
            entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], said[1:], strict=True)
        ]

    def close(self) -> None:
        self._http.close()


class GenerateClient:
    """Samples of one server, from one asyncio loop."""

    def __init__(self, url: str, in_flight: int) -> None:
        self.url = url
        limits = httpx.Limits(
            max_connections=in_flight + 1,
            max_keepalive_connections=in_flight + 1,
            keepalive_expiry=KEEPALIVE_SECONDS,
        )
        self._http = httpx.AsyncClient(
            base_url=url, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), limits=limits, trust_env=False
        )

    async def sample(self, prompt: Sequence[int], parameters: dict[str, Any]) -> Answer:
        """One reply. Waits as long as the server lives, which `watch` finds out. A connection that breaks is tried
        again where the server is well: the same request gives the same reply."""
        body = {"token_ids": list(prompt), "sampling_params": parameters}
        for attempt in range(CONNECTIONS_TRIED):
            try:
                response = await self._http.post(GENERATE, json=body)
            except httpx.TransportError as error:
                if attempt + 1 == CONNECTIONS_TRIED or not await self._healthy():
                    raise ServerLost(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error
            else:
                return read_answer(self.url, check(self.url, response))
        raise AssertionError("the last attempt returns or raises")

    async def watch(self) -> None:
        """Ends by ServerLost when the server has been silent for long enough, else never."""
        failures = 0
        while True:
            await asyncio.sleep(HEALTH_POLL_SECONDS)
            failures = 0 if await self._healthy() else failures + 1
            if failures == HEALTH_FAILURES:
                raise ServerLost(f"{self.url}: no answer to /health, {failures} times in a row")

    async def _healthy(self) -> bool:
        try:
            return (await self._http.get("/health", timeout=HEALTH_TIMEOUT_SECONDS)).is_success
        except httpx.TransportError:
            return False

    async def close(self) -> None:
        await self._http.aclose()
