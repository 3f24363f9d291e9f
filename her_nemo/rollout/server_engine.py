"""Rollouts from vLLM servers over HTTP: the engine that the training loop sees.

Global rank 0 syncs the weights. The first rank of every replica asks the servers for its prompts, in a thread of its
own, and tells the other ranks of its replica; so with `start` a rollout is generated while the same ranks train.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from her_nemo.config.errors import UserError
from her_nemo.megatron import parallel
from her_nemo.rollout.engine import Rollout, Sampling
from her_nemo.rollout.vllm_client import VllmServer
from her_nemo.rollout.vllm_engine import sample_seed
from her_nemo.rollout.vllm_generation import Generation
from her_nemo.rollout.weight_sync import Fleet, SyncError, Transport, synchronise

PROBE_ROWS, PROBE_TOKENS = 2, 32
_ALIVE_SECONDS = 5.0

# Rows of token ids, all of one length -> the trainer's log-prob of every token but the first (collective).
Probe = Callable[[list[list[int]]], list[list[float]]]


@dataclass(frozen=True)
class Request:
    """One call of `generate`."""

    prompts: list[list[int]]
    sampling: Sampling
    seed: int
    indices: list[int]


@dataclass
class _Begun:
    """A rollout that was asked for. `generation` is there on the first rank of a replica alone."""

    request: Request
    updates: int
    generation: Generation | None


@dataclass
class ServerPool:
    """The servers that can be counted on. `lost` may be called from any thread."""

    urls: list[str]
    where: str = ""  # where to look when one is lost
    gone: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def live(self) -> list[str]:
        """Addresses, in the order given."""
        with self._lock:
            return [url for url in self.urls if url not in self.gone]

    def lost(self, url: str, reason: str) -> None:
        """Count on it no more, and say so."""
        with self._lock:
            if url in self.gone:
                return
            self.gone[url] = reason
        left = len(self.live())
        print(f"her-nemo: rollout server lost, {left} left: {reason}", file=sys.stderr, flush=True)

    def everyone_gone(self) -> str:
        """The words of the error."""
        reasons = "; ".join(self.gone[url] for url in self.urls if url in self.gone)
        return f"no rollout server is left: {reasons}.{self.where} The run can be resumed from its last checkpoint."

    def agree(self, live: Sequence[str]) -> None:
        """Take over what the rank that syncs found: others hold weights of an earlier version."""
        with self._lock:
            for url in self.urls:
                if url not in live:
                    self.gone.setdefault(url, f"{url} did not get the last weights")


class ServerEngine:
    """A `RolloutEngine` over vLLM servers that are up. Built on every rank, with equal arguments.

    Args:
        pool: the servers.
        transport: how weights reach them; used on rank 0.
        probe: the trainer's log-probs, to compare with the servers' after every sync.
        probe_limit: largest difference allowed, nats.
        vocab_size, max_model_len: of the model; the probe's tokens are drawn within.
        in_flight: requests a server is given at a time.
        sleeps: the servers share the trainer's devices and give their memory away at every `rest`.
    """

    def __init__(
        self,
        pool: ServerPool,
        transport: Transport,
        probe: Probe,
        *,
        probe_limit: float,
        vocab_size: int,
        max_model_len: int,
        in_flight: int,
        sleeps: bool = False,
    ) -> None:
        self._pool = pool
        self._transport = transport
        self._probe = probe
        self._probe_limit = probe_limit
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._in_flight = in_flight
        self._sleeps = sleeps
        self._asleep = False
        self._servers = {url: VllmServer(url) for url in pool.urls} if parallel.is_main() else {}
        self._version: int | None = None
        self._updates = 0
        self._ahead: _Begun | None = None
        self._tags: dict[str, float] = {}
        self.staleness = 0

    def tags(self) -> dict[str, float]:
        """What the last sync and the last `generate` have to report, for the log."""
        return dict(self._tags)

    def start(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, indices: Sequence[int] | None = None
    ) -> None:
        """Begin a rollout with the present weights; the `generate` with the same arguments will return it."""
        if self._ahead is not None:
            raise RuntimeError("a rollout has been started already and was not taken")
        numbers = list(range(len(prompts)) if indices is None else indices)
        self._ahead = self._begin(Request(prompts, sampling, seed, numbers))

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seed: int, *, indices: Sequence[int] | None = None
    ) -> Rollout:
        """Sample one reply a prompt. See `RolloutEngine.generate`. Log-probs are under softmax(logits / temperature);
        with top-k or top-p on, under the cut distribution.

        Collective over the ranks of a replica.

        Raises:
            UserError: no server is left, or one refuses the request.
        """
        self._wake()
        numbers = list(range(len(prompts)) if indices is None else indices)
        request = Request(prompts, sampling, seed, numbers)
        begun, self._ahead = self._ahead, None
        if begun is None or begun.request != request:
            begun, self._ahead = self._begin(request), begun
        waited = time.perf_counter()
        rollout, seconds = parallel.on_replica_leader(partial(_finish, begun.generation))
        waited = time.perf_counter() - waited
        self.staleness = self._updates - begun.updates
        self._tags |= {
            "rollout/staleness": self.staleness,
            "rollout/weight_version": rollout.weight_version,
            "rollout/servers": len(self._pool.live()),
            "timers/rollout": seconds,
            "rollout/overlap": max(0.0, 1.0 - waited / seconds) if seconds else 0.0,
        }
        return rollout

    def update_weights(self, named: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over the trainer's weights, given as Hugging Face names and whole tensors, and prove it. Collective.

        A rollout that was started is finished first: every reply comes from one version.

        Raises:
            UserError: no server is left.
            SyncError: a server has other weights than the trainer.
        """
        self._settle()
        self._wake()
        begun = time.perf_counter()
        fleet = Fleet([self._servers[url] for url in self._pool.live()] if self._servers else [], self._lost)
        problem: UserError | None = None
        try:
            if parallel.is_main():
                synchronise(fleet, self._transport, named, version)
        except UserError as error:
            problem = error
        for _ in named:  # the other ranks take part in making the tensors; so does this one after a failure
            continue
        parallel.on_main(partial(_raise, problem))
        self._prove(fleet, version)
        self._version = version
        self._updates += 1
        self._tags["timers/sync"] = time.perf_counter() - begun

    def rest(self) -> None:
        """Let the servers give their memory to the trainer, where they share its devices (collective over all ranks).
        They keep their weights in main memory, and wake at the next `generate` or `update_weights`."""
        if not self._sleeps or self._asleep:
            return
        parallel.barrier()  # every replica has its replies
        begun = time.perf_counter()
        self._tell("/sleep", level="1")
        self._asleep = True
        self._tags["timers/sleep"] = time.perf_counter() - begun

    def _wake(self) -> None:
        if not self._asleep:
            return
        begun = time.perf_counter()
        self._tell("/wake_up")
        self._asleep = False
        self._tags["timers/wake"] = time.perf_counter() - begun

    def _tell(self, path: str, **query: str) -> None:
        """POST to all servers, from rank 0; all ranks learn which of them are left."""

        def post(_alive: Callable[[], None]) -> list[str]:
            fleet = Fleet([self._servers[url] for url in self._pool.live()], self._lost)
            fleet.post(path, **query)
            if not fleet.servers:
                raise UserError(self._pool.everyone_gone())
            return [server.url for server in fleet.servers]

        self._pool.agree(parallel.on_main(post))

    def close(self) -> None:
        """Drop what is being generated. The servers are not this object's to stop."""
        if self._ahead is not None and self._ahead.generation is not None:
            self._ahead.generation.cancel()
        self._transport.close()
        for server in self._servers.values():
            server.close()

    def _begin(self, request: Request) -> _Begun:
        if self._version is None:
            raise RuntimeError("update_weights has to come before the first rollout")
        generation = None
        if parallel.is_replica_leader():
            generation = Generation(
                self._pool.live(),
                request.prompts,
                request.sampling,
                [sample_seed(request.seed, index) for index in request.indices],
                version=self._version,
                in_flight=self._in_flight,
                on_lost=self._pool.lost,
                everyone_gone=self._pool.everyone_gone,
            )
        return _Begun(request, self._updates, generation)

    def _settle(self) -> None:
        """Wait for the rollout that was started, on all replicas, without taking it."""
        if self._ahead is not None:
            parallel.on_replica_leader(partial(_wait, self._ahead.generation))
            parallel.barrier()

    def _lost(self, server: VllmServer, reason: str) -> None:
        self._pool.lost(server.url, reason)

    def _prove(self, fleet: Fleet, version: int) -> None:
        """The servers say of probe tokens what the trainer says; all ranks learn which servers are left."""
        length = min(PROBE_TOKENS, self._max_model_len - 1)
        generator = torch.Generator().manual_seed(version)
        rows = torch.randint(self._vocab_size, (PROBE_ROWS, length), generator=generator).tolist()
        expected = self._probe(rows)

        def compare(_alive: Callable[[], None]) -> tuple[list[str], float]:
            said = fleet.each(lambda server: [server.log_probs(row) for row in rows])
            worst = 0.0
            for server, found in said.items():
                gap = float((torch.tensor(found) - torch.tensor(expected)).abs().max())
                if not gap <= self._probe_limit:
                    raise SyncError(
                        f"{server} has other weights than the trainer after the sync of version {version}: its "
                        f"log-probs differ by {gap:.3g}, more than {self._probe_limit:g}"
                    )
                worst = max(worst, gap)
            if not fleet.servers:
                raise UserError(self._pool.everyone_gone())
            return [server.url for server in fleet.servers], worst

        live, worst = parallel.on_main(compare)
        self._pool.agree(live)
        self._tags["rollout/probe_gap_max"] = worst


def _wait(generation: Generation | None, alive: Callable[[], None]) -> None:
    assert generation is not None
    while not generation.wait(_ALIVE_SECONDS):
        alive()


def _finish(generation: Generation | None, alive: Callable[[], None]) -> tuple[Rollout, float]:
    assert generation is not None
    _wait(generation, alive)
    return generation.result(), generation.seconds


def _raise(problem: UserError | None, _alive: Callable[[], None]) -> None:
    if problem is not None:
        raise problem
