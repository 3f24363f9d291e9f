"""vLLM servers beside the trainer, or on its GPUs: what lies on each of theirs, how long a rollout and a sync take."""

from __future__ import annotations

from dataclasses import dataclass

from her_nemo.config.schema import PpoConfig
from her_nemo.planning import calibration as cal
from her_nemo.planning import memory, timing
from her_nemo.planning.shapes import Layout, Shape, total_parameters
from her_nemo.planning.timing import Machine, Work


@dataclass(frozen=True)
class Servers:
    """The servers of one configuration; bytes are those of one of their GPUs, seconds those of one PPO step."""

    count: int
    tensor: int  # GPUs of each
    weights: int
    cache: int  # keys and values of `together` sequences of the longest
    together: int  # sequences that a server decodes at once
    rollout_seconds: float
    sync_seconds: float
    taken: int = 0  # bytes of each of the trainer's GPUs while servers that share them are awake

    @property
    def gpus(self) -> int:
        """GPUs beside the trainer's."""
        return 0 if self.taken else self.count * self.tensor


def of(config: PpoConfig, shape: Shape, machine: Machine, length: float) -> Servers | None:
    """The servers of a PPO configuration, None where the actor itself generates.

    Servers that are given by address are taken to have a machine each, all its GPUs: the configuration does not say.

    Args:
        length: mean tokens of a sequence; a reply is taken to be as long as allowed, or all of it.
    """
    ppo, vllm = config.model.ppo, config.model.ppo.vllm
    if ppo.rollout_engine != "vllm":
        return None
    elsewhere = len(vllm.servers)
    count, tensor = (elsewhere, machine.per_node) if elsewhere else (vllm.num_servers, vllm.tensor_parallel_size)
    engine = Work(shape, Layout(tensor=tensor), machine, config.trainer.precision)
    longest = config.model.encoder_seq_length
    fitting = timing.engine_capacity(engine, longest, memory_share=vllm.gpu_memory_utilization)
    together = min(fitting, vllm.max_num_seqs)
    reply = min(ppo.length_params.max_length, length)
    weights = total_parameters(shape) * engine.element
    cache = memory.kv_cache_bytes(
        shape, engine.layout, sequences=max(1, together), length=longest, precision=engine.precision
    )
    seconds = timing.engine_seconds(
        engine, sequences=ppo.num_rollout_samples / count, prompt=max(1.0, length - reply), reply=reply,
        longest=reply, concurrent=max(1, together),
    )  # fmt: skip
    wire = machine.gpu.network if elsewhere else machine.gpu.nvlink
    sync = weights / (wire * cal.COLLECTIVE_EFFICIENCY)
    taken = int(machine.gpu.memory * vllm.gpu_memory_utilization) if vllm.colocated else 0
    return Servers(count, tensor, weights // tensor, cache, together, seconds, sync, taken)
