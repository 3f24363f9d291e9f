"""A judge behind OpenAI-compatible servers, vLLM's for instance: all questions under way at once, within bounds.

The first rank of each replica asks, the others are told. A question that fails is put again, to another server where
there is one; a server that keeps failing is left alone for a while. No answer after that is no verdict.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from her_nemo.config.errors import UserError
from her_nemo.config.rl import JudgeSource
from her_nemo.config.synthesis import Limits
from her_nemo.data.synthesis.endpoint import Completion, Endpoint, EndpointFailure
from her_nemo.megatron import parallel
from her_nemo.rewards.judge import Answer
from her_nemo.roleplay.prompt import Message
from her_nemo.roleplay.verdict import VERDICT_SCHEMA

KEY = "reward.generative.judge"
ALIVE_SECONDS = 5.0
# A question that failed waits this long, doubled each time, up to the second; so does a server that keeps failing.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 8.0
FAILURES_IN_A_ROW, AVOIDED_SECONDS, MAX_AVOIDED_SECONDS = 3, 10.0, 600.0
NEVER = 10**9


@dataclass
class _Server:
    """One server and how it has been doing."""

    url: str
    endpoint: Endpoint | None = None
    under_way: int = 0
    failures: int = 0  # since the last answer
    avoided_until: float = 0.0

    def answered(self) -> None:
        self.failures, self.avoided_until = 0, 0.0

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= FAILURES_IN_A_ROW:
            longer = min(AVOIDED_SECONDS * 2.0 ** (self.failures - FAILURES_IN_A_ROW), MAX_AVOIDED_SECONDS)
            self.avoided_until = time.monotonic() + longer


class _UnderWay:
    """Questions that a thread is asking, so that this process can do its own work meanwhile."""

    def __init__(
        self,
        conversations: Sequence[list[Message]],
        ask: Callable[[Sequence[list[Message]]], Coroutine[Any, Any, list[Answer]]],
    ) -> None:
        self.conversations = conversations
        self._ask = ask
        self._answers: list[Answer] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answers = asyncio.run(self._ask(self.conversations))
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Wait at most this long; whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> list[Answer]:
        """The answers, once it has ended; raises what ended it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answers


class ServerJudge:
    """A `Judge` over servers that are up. Built on every rank (collective), with equal arguments.

    Args:
        keys: `reward.generative.judge.*`.

    Raises:
        UserError: a server does not answer, or two of them serve different checkpoints under the judge's name.
    """

    def __init__(self, keys: JudgeSource) -> None:
        self._keys = keys
        self._servers = [_Server(url.rstrip("/")) for url in keys.servers]
        self._under_way: _UnderWay | None = None
        served = parallel.on_main(lambda _alive: asyncio.run(self._identities()))
        self.identity: Mapping[str, Any] = {
            "judge": served,
            "sampling": [keys.temperature, keys.top_p, keys.max_tokens],
            "structured": keys.structured_output,
        }

    def begin(self, conversations: Sequence[list[Message]]) -> None:
        """See `Judge.begin`: the first rank of the replica asks in a thread."""
        if parallel.is_replica_leader():
            self._under_way = _UnderWay(conversations, self._all)

    def ask(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        """See `Judge.ask`."""
        return parallel.on_replica_leader(partial(self._wait, conversations))

    def _wait(self, conversations: Sequence[list[Message]], alive: Callable[[], None]) -> list[Answer]:
        under_way, self._under_way = self._under_way, None
        if under_way is None or under_way.conversations != conversations:
            under_way = _UnderWay(conversations, self._all)
        while not under_way.wait(ALIVE_SECONDS):
            alive()
        return under_way.result()

    def _limits(self) -> Limits:
        """Retries and the loss of a server are this class's own, since several servers share them."""
        return Limits(
            concurrency=self._keys.concurrency * len(self._servers),
            timeout_seconds=self._keys.timeout_seconds,
            retries=0,
            give_up_after=NEVER,
        )

    async def _identities(self) -> dict[str, Any]:
        """The judge as its servers tell it (Endpoint.identity)."""
        assert self._keys.model is not None  # planning/judge_checks.py
        found = []
        for server in self._servers:
            async with Endpoint(server.url, self._limits(), self._keys.api_key_env) as endpoint:
                try:
                    found.append(await endpoint.identity(self._keys.model))
                except UserError as error:
                    raise UserError(f"{KEY}.servers: {error}") from error
        roots = sorted({said["root"] for said in found if "root" in said})
        if len(roots) > 1:
            raise UserError(f"{KEY}.servers: {self._keys.model!r} is {' at one and '.join(roots)} at another server")
        return {"model": self._keys.model, "served": roots or sorted(said["endpoint"] for said in found)}

    async def _all(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        async with AsyncExitStack() as closing:
            for server in self._servers:
                endpoint = Endpoint(server.url, self._limits(), self._keys.api_key_env)
                server.endpoint, server.under_way = await closing.enter_async_context(endpoint), 0
            slots = asyncio.Semaphore(self._limits().concurrency)
            tasks = [asyncio.create_task(self._answer(messages, slots)) for messages in conversations]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        answers = [task.result() for task in tasks]
        if answers and all(answer.text is None for answer in answers):
            reasons = "; ".join(dict.fromkeys(answer.problem for answer in answers[:3]))
            raise UserError(
                f"{KEY}.servers: none of {len(answers)} questions was answered: {reasons}. Is the server up? The run "
                "can be resumed from its last checkpoint."
            )
        return answers

    async def _answer(self, messages: list[Message], slots: asyncio.Semaphore) -> Answer:
        """One answer, from whichever server gives it."""
        tried: set[str] = set()
        problem = ""
        for attempt in range(self._keys.retries + 1):
            if attempt:
                await asyncio.sleep(min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS))
            async with slots:
                server = self._choose(tried)
                tried.add(server.url)
                assert server.endpoint is not None
                server.under_way += 1
                try:
                    completion = await server.endpoint.complete(self._request(messages))
                except EndpointFailure as failure:
                    problem = f"{server.url}: {failure}"
                    if failure.kind.startswith("http_4") and failure.kind != "http_429":
                        return Answer(None, problem)  # the server is well, the question is not
                    server.failed()
                else:
                    server.answered()
                    return _read(completion)
                finally:
                    server.under_way -= 1
        return Answer(None, problem)

    def _choose(self, tried: set[str]) -> _Server:
        """The server with the least to do, of those that are well and have not failed at this question."""
        now = time.monotonic()
        return min(
            self._servers, key=lambda server: (server.url in tried, server.avoided_until > now, server.under_way)
        )

    def _request(self, messages: list[Message]) -> dict[str, Any]:
        keys = self._keys
        request: dict[str, Any] = {
            "model": keys.model,
            "messages": messages,
            "temperature": keys.temperature,
            "top_p": keys.top_p,
            "max_tokens": keys.max_tokens,
        }
        if keys.structured_output:
            schema = {"name": "verdict", "schema": VERDICT_SCHEMA, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request


def _read(completion: Completion) -> Answer:
    cut = completion.finish_reason == "length"
    return Answer(completion.text, f"cut off at {KEY}.max_tokens" if cut else "")
