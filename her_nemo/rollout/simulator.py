"""Who plays the other character of a conversation: a script, or a model behind OpenAI-compatible servers (vLLM)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from her_nemo.config.errors import UserError
from her_nemo.config.rl import DialogueSimulator
from her_nemo.config.synthesis import Limits
from her_nemo.data.synthesis.endpoint import RETRIED, Endpoint, EndpointFailure
from her_nemo.roleplay.dialogue import Start
from her_nemo.roleplay.prompt import Message

SERVERS = "model.ppo.dialogue.simulator.servers"
_ALIVE_SECONDS = 1.0
_NEVER = 1_000_000_000


@dataclass(frozen=True)
class Ask:
    """One turn that the simulator is to write.

    Attributes:
        start: of the conversation.
        turn: its number among the simulator's turns since the start, from 0.
        messages: the simulator's prompt (`Conversation.partner_messages`).
        seed: for its sampling.
    """

    start: Start
    turn: int
    messages: Sequence[Message]
    seed: int


class Simulator(Protocol):
    """Anything that can play the other character."""

    def answer(self, asked: Sequence[Ask], alive: Callable[[], None]) -> list[str]:
        """A turn for each conversation. `alive` is to be called every few seconds: other ranks are waiting.

        Raises:
            UserError: it cannot answer any more.
        """
        ...


class ScriptSimulator:
    """Says each conversation's lines in turn, whatever it hears."""

    def answer(self, asked: Sequence[Ask], alive: Callable[[], None]) -> list[str]:
        del alive
        return [ask.start.lines[ask.turn] for ask in asked]


class ServedSimulator:
    """A model behind one or several OpenAI-compatible servers. A server that fails a request for good is not used
    again in this run; its conversations go on at the others."""

    def __init__(self, section: DialogueSimulator) -> None:
        self._section = section
        self._lost: dict[str, str] = {}

    def answer(self, asked: Sequence[Ask], alive: Callable[[], None]) -> list[str]:
        return asyncio.run(self._answer(asked, alive))

    def _live(self) -> list[str]:
        return [url for url in self._section.servers if url not in self._lost]

    async def _answer(self, asked: Sequence[Ask], alive: Callable[[], None]) -> list[str]:
        section = self._section
        # Giving up is decided here, by server.
        limits = Limits(
            concurrency=section.concurrency, timeout_seconds=section.timeout_seconds, retries=section.retries,
            max_backoff_seconds=10.0, give_up_after=_NEVER,
        )  # fmt: skip
        async with AsyncExitStack() as closing:
            endpoints = {
                url: await closing.enter_async_context(Endpoint(url, limits, section.api_key_env))
                for url in self._live()
            }
            tasks = [
                asyncio.create_task(self._one(endpoints, number, ask)) for number, ask in enumerate(asked)
            ]
            pending = set(tasks)
            try:
                while pending:
                    done, pending = await asyncio.wait(
                        pending, timeout=_ALIVE_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                    )
                    for task in done:
                        task.result()
                    alive()
                return [task.result() for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, endpoints: dict[str, Endpoint], number: int, ask: Ask) -> str:
        while live := self._live():
            url = live[number % len(live)]
            try:
                return (await endpoints[url].complete(self._request(ask))).text
            except EndpointFailure as failure:
                status = failure.kind.removeprefix("http_")
                if status.isdigit() and int(status) < 500 and int(status) not in RETRIED:
                    raise UserError(
                        f"the simulator at {url} refused the conversation {ask.start.trace_id}: {failure}"
                    ) from failure
                self._lose(url, str(failure))
        reasons = "; ".join(f"{url}: {self._lost[url]}" for url in self._section.servers)
        raise UserError(
            f"no simulator is left: {reasons}. Start the servers of {SERVERS} again; the run can be resumed from its "
            "last checkpoint."
        )

    def _lose(self, url: str, reason: str) -> None:
        if url not in self._lost:
            self._lost[url] = reason
            left = len(self._live())
            print(f"her-nemo: simulator {url} lost, {left} left: {reason}", file=sys.stderr, flush=True)

    def _request(self, ask: Ask) -> dict[str, Any]:
        return {
            "model": self._section.model,
            "messages": list(ask.messages),
            "temperature": self._section.temperature,
            "max_tokens": self._section.max_tokens,
            "seed": ask.seed,
            # A model that goes on with the policy's own turn is stopped there.
            "stop": [f"\n{ask.start.me}:"],
        }
