"""Weights from the trainer's first GPU to the workers of all vLLM servers, by vLLM's own NCCL trainer side.

Not run yet: it needs two GPUs. A server that dies while tensors are on their way leaves the group in NCCL's hands;
one that dies between updates is left out of the next group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from her_nemo.rollout.checksum import Checksum
from her_nemo.rollout.vllm_client import VllmServer
from her_nemo.rollout.vllm_server import free_port
from her_nemo.rollout.weight_sync import Fleet


class NcclTransport:
    """`weight_sync.Transport` over NCCL.

    Args:
        address: of this machine, as the servers reach it.
        shapes: Hugging Face name -> shape, in the order in which the tensors will come.
        dtype: of the tensors on the wire.
    """

    def __init__(self, address: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._address = address
        self._source = _Source(shapes, dtype)
        self._clients: _Clients | None = None
        self._engine: Any = None

    def deliver(self, fleet: Fleet, named: Iterator[tuple[str, Tensor]], seen: Checksum, version: int) -> None:
        if self._clients is None or list(self._clients.offsets) != fleet.servers:
            self._connect(fleet)
        assert self._clients is not None
        self._clients.fleet, self._clients.version = fleet, version
        self._source.named, self._source.seen = named, seen
        self._engine.send_weights()

    def _connect(self, fleet: Fleet) -> None:
        """One NCCL group over this process and all workers; made anew when a server is gone."""
        if self._clients is not None:
            self.close()
            fleet.post("/shutdown_weight_transfer_engine")
        sizes = fleet.each(lambda server: server.world_size())
        self._clients = _Clients(fleet, sizes)
        info = NCCLTrainerInitInfo(
            master_address=self._address, master_port=free_port(), world_size=1 + sum(sizes.values()), rank=0
        )
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._clients, source=self._source)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = self._clients = None


class _Source(WeightSource):
    """The tensors of one update, taken to the GPU one by one."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._metadata = [ParamMeta(name, dtype, tuple(size)) for name, size in shapes.items()]
        self._dtype = dtype
        self.named: Iterator[tuple[str, Tensor]] = iter(())
        self.seen = Checksum()

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.named:
            there = tensor.to("cuda", self._dtype).contiguous()
            self.seen.add(name, there)
            yield name, there


class _Clients:
    """vLLM's VLLMWeightSyncClient over several servers, each with ranks of its own in the group."""

    def __init__(self, fleet: Fleet, sizes: Mapping[VllmServer, int]) -> None:
        self.fleet = fleet
        self.version = 0
        self.offsets: dict[VllmServer, int] = {}
        following = 1  # 0 is the trainer
        for server, size in sizes.items():
            self.offsets[server] = following
            following += size

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def greet(server: VllmServer) -> None:
            info = init_info | {"rank_offset": self.offsets[server]}
            server.post("/init_weight_transfer_engine", {"init_info": info})

        self.fleet.each(greet)

    def start_weight_update(self) -> None:
        self.fleet.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.fleet.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.fleet.post("/finish_weight_update", {"weight_version": weight_version or str(self.version)})
