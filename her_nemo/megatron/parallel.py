"""Process groups, ranks and the few collectives that the rest of her_nemo needs, by meaning rather than by group."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from her_nemo.config.errors import UserError
from her_nemo.megatron import platform

ALIVE_SECONDS = 20.0
Result = TypeVar("Result")


def initialize(
    *, tensor: int = 1, pipeline: int = 1, seed: int = 0, timeout_minutes: int = 30
) -> None:
    """Start torch.distributed and megatron-core's groups, and seed every generator.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it this is a
    world of one process. The data-parallel size is world // (tensor * pipeline). A second call with the same
    sizes only seeds again.
    Raises UserError if tensor * pipeline does not divide the number of processes.
    """
    platform.apply()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tensor * pipeline) != 0:
        raise UserError(
            f"{world} processes cannot be split into tensor_model_parallel_size={tensor} x "
            f"pipeline_model_parallel_size={pipeline}: start a multiple of {tensor * pipeline} processes "
            f"(trainer.devices x trainer.num_nodes) or change the two sizes"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if world == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(
                platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
        else:
            dist.init_process_group(platform.backend(), timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        if (tensor_size(), pipeline_size()) != (tensor, pipeline):
            raise RuntimeError(
                f"already initialised as tensor={tensor_size()} x pipeline={pipeline_size()}: call destroy() first"
            )
        set_seed(seed)
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    set_seed(seed)


def set_seed(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker. Pipeline stages differ; TP and DP ranks agree."""
    seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy() -> None:
    """Take down megatron-core's groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def tensor_rank() -> int:
    """Rank within the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    """Number of tensor-parallel ranks."""
    return parallel_state.get_tensor_model_parallel_world_size()


def pipeline_rank() -> int:
    """Index of this rank's pipeline stage."""
    return parallel_state.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    """Number of pipeline stages."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def tensor_group() -> dist.ProcessGroup:
    """The tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_group()


def data_rank() -> int:
    """Rank among the data-parallel replicas."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Number of data-parallel replicas."""
    return parallel_state.get_data_parallel_world_size()


def is_first_stage() -> bool:
    """True on ranks that hold the embedding."""
    return pipeline_rank() == 0


def is_last_stage() -> bool:
    """True on ranks that hold the head."""
    return pipeline_rank() == pipeline_size() - 1


def previous_stage_rank() -> int:
    """Global rank of this rank's neighbour on the stage before."""
    return parallel_state.get_pipeline_model_parallel_prev_rank()


def next_stage_rank() -> int:
    """Global rank of this rank's neighbour on the stage after."""
    return parallel_state.get_pipeline_model_parallel_next_rank()


def is_main() -> bool:
    """True on global rank 0, the one that logs and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if dist.get_world_size() > 1:
        dist.barrier()


def broadcast_from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` (same shape and dtype everywhere) from the last stage to all stages, in place."""
    if pipeline_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=parallel_state.get_pipeline_model_parallel_group())
    return tensor


def broadcast_object_from_last_stage(value: Any) -> Any:
    """The last stage's `value` (small, picklable) on every stage of this replica."""
    if pipeline_size() == 1:
        return value
    box = [value]
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(box, source, group=parallel_state.get_pipeline_model_parallel_group())
    return box[0]


def broadcast_object(value: Any) -> Any:
    """Global rank 0's `value` (small, picklable) on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def is_replica_leader() -> bool:
    """True on the first rank of each replica."""
    return dist.get_rank() == parallel_state.get_model_parallel_src_rank()


def on_main(work: Callable[[Callable[[], None]], Result]) -> Result:
    """`work(alive)`, done on global rank 0 alone; its (small, picklable) result on every rank (collective).

    `work` calls `alive()` every few seconds, so that the others, who wait in a collective, do not time out. A
    UserError it raises is raised on every rank.
    """
    return _on_one(work, 0, None, dist.get_world_size())


def on_replica_leader(work: Callable[[Callable[[], None]], Result]) -> Result:
    """`on_main` for every replica by itself: done on its first rank, the result on its ranks."""
    leader, group = parallel_state.get_model_parallel_src_rank(), parallel_state.get_model_parallel_group()
    return _on_one(work, leader, group, tensor_size() * pipeline_size())


def _on_one(
    work: Callable[[Callable[[], None]], Result], leader: int, group: dist.ProcessGroup | None, size: int
) -> Result:
    if size == 1:
        return work(lambda: None)

    def tell(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, leader, group=group)
        return box[0]

    if dist.get_rank() == leader:
        said = time.monotonic()

        def alive() -> None:
            nonlocal said
            if time.monotonic() - said > ALIVE_SECONDS:
                tell(("working", None))
                said = time.monotonic()

        try:
            result = work(alive)
        except UserError as error:
            tell(("failed", str(error)))
            raise
        tell(("done", result))
        return result
    while True:
        state, value = tell(None)
        if state == "failed":
            raise UserError(value)
        if state == "done":
            return value


def data_all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` over the data-parallel replicas, in place."""
    if data_size() > 1:
        dist.all_reduce(tensor, op=op, group=parallel_state.get_data_parallel_group())
    return tensor


def data_gather_objects(value: Any) -> list[Any]:
    """Every data-parallel replica's `value` (small, picklable), in the order of the replicas, on every rank."""
    if data_size() == 1:
        return [value]
    found: list[Any] = [None] * data_size()
    dist.all_gather_object(found, value, group=parallel_state.get_data_parallel_group())
    return found


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on any rank of the world."""
    if dist.get_world_size() == 1:
        return flag
    vote = torch.tensor([1 if flag else 0], dtype=torch.int32, device=platform.device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())
