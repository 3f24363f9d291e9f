"""New weights for running vLLM servers: pause, start, update piece by piece, finish with a version, resume.

Two ways for the bytes: safetensors files that both sides can open (CPU, or a shared file system), and NCCL from
the trainer's first rank to all workers (`vllm_nccl`). Either way every worker says what
arrived, and its checksum must be that of what was sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from her_nemo.config.errors import UserError
from her_nemo.rollout.checksum import Checksum
from her_nemo.rollout.vllm_client import ServerLost, VllmServer

PIECE_BYTES = 1 << 30
Lost = Callable[[VllmServer, str], None]


class SyncError(UserError):
    """A server holds other weights than it was sent."""


class Transport(Protocol):
    """A way for tensors to reach servers."""

    def deliver(self, fleet: Fleet, named: Iterator[tuple[str, Tensor]], seen: Checksum, version: int) -> None:
        """vLLM's four phases: init (with servers not met before), start, update, finish with the version. Adds
        to `seen` what is sent."""
        ...

    def close(self) -> None: ...


class Fleet:
    """The servers of one update. A call goes to all at once; one that fails is told to `lost` and left out."""

    def __init__(self, servers: Sequence[VllmServer], lost: Lost) -> None:
        self.servers = list(servers)
        self._lost = lost

    def each(self, call: Callable[[VllmServer], Any]) -> dict[VllmServer, Any]:
        """What `call` says for each server that is still there afterwards."""
        if not self.servers:
            return {}
        with ThreadPoolExecutor(len(self.servers)) as pool:
            asked = {server: pool.submit(call, server) for server in self.servers}
        answers = {}
        for server, future in asked.items():
            error = future.exception()
            if isinstance(error, ServerLost):
                self.drop(server, str(error))
            else:
                answers[server] = future.result()
        return answers

    def post(self, path: str, body: dict[str, Any] | None = None, **query: str) -> None:
        self.each(lambda server: server.post(path, body, **query))

    def drop(self, server: VllmServer, reason: str) -> None:
        self.servers.remove(server)
        self._lost(server, reason)


def synchronise(fleet: Fleet, transport: Transport, named: Iterator[tuple[str, Tensor]], version: int) -> None:
    """Give every server of `fleet` the tensors `named` as weights `version`. Servers lost on the way are left out
    of `fleet`.

    Raises:
        SyncError: a worker's checksum is not that of what was sent.
    """
    seen = Checksum()
    # Nobody else should be generating; if someone is, a reply must not change its weights half-way.
    fleet.post("/pause", mode="wait")
    fleet.each(lambda server: server.workers("her_nemo_expect"))
    transport.deliver(fleet, named, seen, version)
    arrived = fleet.each(lambda server: server.workers("her_nemo_received"))
    fleet.post("/reset_prefix_cache")
    fleet.post("/resume")
    for server, said in arrived.items():
        wrong = [text for text in said if text != seen.text]
        if wrong:
            raise SyncError(
                f"{server} received other weights than were sent as version {version}: checksum {wrong[0]}, "
                f"sent {seen.text}"
            )


class FileTransport:
    """Tensors as safetensors files in a directory that the servers see under the same path.

    Args:
        directory: emptied after every update.
        dtype: of the written tensors; None keeps theirs.
        piece_bytes: size of a file, about.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None, piece_bytes: int = PIECE_BYTES) -> None:
        self._directory = directory
        self._dtype = dtype
        self._piece_bytes = piece_bytes
        self._greeted: set[VllmServer] = set()

    def deliver(self, fleet: Fleet, named: Iterator[tuple[str, Tensor]], seen: Checksum, version: int) -> None:
        fleet.each(self._greet)
        fleet.post("/start_weight_update")
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            for number, piece in enumerate(_pieces(named, self._piece_bytes)):
                tensors = {name: tensor.to(self._dtype or tensor.dtype).contiguous() for name, tensor in piece}
                seen.update(tensors.items())
                path = self._directory.resolve() / f"piece_{number:05d}.safetensors"
                save_file(tensors, path)
                fleet.post("/update_weights", {"update_info": {"path": str(path)}})
            fleet.post("/finish_weight_update", {"weight_version": str(version)})
        finally:
            # Not before: a server may keep a piece mapped until the layer it belongs to is complete.
            shutil.rmtree(self._directory)

    def _greet(self, server: VllmServer) -> None:
        """vLLM wants its first phase once, though files need no agreement."""
        if server not in self._greeted:
            server.post("/init_weight_transfer_engine", {"init_info": {}})
            self._greeted.add(server)

    def close(self) -> None:
        return


def _pieces(named: Iterable[tuple[str, Tensor]], size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors in groups of about `size` bytes."""
    piece: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in named:
        piece.append((name, tensor.detach()))
        held += tensor.numel() * tensor.element_size()
        if held >= size:
            yield piece
            piece, held = [], 0
    if piece:
        yield piece
