"""Which rollout engine a PPO run has, from its configuration: the trainer's own model, or vLLM servers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from her_nemo.config.errors import UserError
from her_nemo.config.schema import PpoConfig
from her_nemo.config.sections import VllmRollout
from her_nemo.megatron import forward, parallel
from her_nemo.megatron.qwen3 import Model
from her_nemo.megatron.qwen3_map import hf_shapes, wholes
from her_nemo.rollout.engine import TrainingEngine
from her_nemo.rollout.invariants import ROLLOUT_GAP_LIMIT
from her_nemo.rollout.megatron_engine import MegatronEngine
from her_nemo.rollout.server_engine import ServerEngine, ServerPool
from her_nemo.rollout.vllm_client import VllmServer
from her_nemo.rollout.vllm_server import LOOPBACK, ServerOptions, ServerProcess, gpus_after, started
from her_nemo.rollout.weight_sync import FileTransport, Transport

READY_POLL_SECONDS = 0.5


@contextlib.contextmanager
def open_engine(cfg: PpoConfig, actor: Model, *, pad_id: int, run_dir: Path) -> Iterator[TrainingEngine]:
    """The engine that `model.ppo.rollout_engine` names, for as long as the block lasts (collective).

    Servers started here end with the block, or with this process.

    Raises:
        UserError: a server does not come up; its log is quoted.
    """
    if cfg.model.ppo.rollout_engine == "megatron":
        yield MegatronEngine(
            actor,
            pad_id=pad_id,
            micro_batch_size=cfg.model.ppo.rollout_micro_batch_size,
            share_prompts=cfg.model.ppo.share_prompts,
        )
        return
    with contextlib.ExitStack() as closing:
        folder = run_dir / "rollout"
        processes = closing.enter_context(_own_servers(cfg, actor, folder))
        urls = parallel.on_main(partial(_ready, cfg.model.ppo.vllm, processes))
        pool = ServerPool(urls, where=f" Their logs: {folder}/server_*.log." if processes else "")
        engine = ServerEngine(
            pool,
            _transport(cfg, actor, folder),
            partial(_log_probs, actor),
            probe_limit=ROLLOUT_GAP_LIMIT[cfg.trainer.precision],
            vocab_size=actor.shape.vocab_size,
            max_model_len=cfg.model.encoder_seq_length,
            in_flight=2 * cfg.model.ppo.vllm.max_num_seqs,
            sleeps=cfg.model.ppo.vllm.colocated,
        )
        closing.callback(engine.close)
        yield engine


def _backend(cfg: PpoConfig) -> str:
    sync = cfg.model.ppo.vllm.sync
    if sync == "auto":
        # Two members of a NCCL group cannot have one GPU.
        shared = cfg.model.ppo.vllm.colocated
        sync = "nccl" if torch.cuda.is_available() and not shared else "files"
    return "nccl" if sync == "nccl" else "her_nemo_files"


@contextlib.contextmanager
def _own_servers(cfg: PpoConfig, actor: Model, folder: Path) -> Iterator[list[ServerProcess]]:
    """The servers started by this run: on the main rank, where none are given."""
    vllm = cfg.model.ppo.vllm
    if vllm.servers or not parallel.is_main():
        yield []
        return
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    dtype = actor.precision.params_dtype
    (model / "config.json").write_text(json.dumps(actor.shape.to_hf_config(dtype=dtype), indent=2) + "\n")
    options = ServerOptions(
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=cfg.model.encoder_seq_length,
        max_num_seqs=vllm.max_num_seqs,
        tensor_parallel_size=vllm.tensor_parallel_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        prefix_caching=vllm.prefix_caching,
        backend=_backend(cfg),
        sleeps=vllm.colocated,
    )
    first = 0 if vllm.colocated else cfg.trainer.devices
    gpus = gpus_after(first, vllm.num_servers, vllm.tensor_parallel_size, os.environ)
    with started(options, folder, gpus) as processes:
        for process in processes:
            print(f"rollout server {process.url}: process {process.pid}, log {process.log}", flush=True)
        yield processes


def _ready(vllm: VllmRollout, processes: list[ServerProcess], alive: Callable[[], None]) -> list[str]:
    """Wait until every server answers; their addresses."""
    urls = [process.url for process in processes] or [url.rstrip("/") for url in vllm.servers]
    waiting = {url: VllmServer(url) for url in urls}
    by_url = {process.url: process for process in processes}
    deadline = time.monotonic() + vllm.start_timeout
    while waiting:
        alive()
        for url, server in list(waiting.items()):
            ended = by_url[url].ended() if url in by_url else None
            if ended is not None:
                raise UserError(f"rollout server {url} did not start: it {ended}")
            if server.healthy():
                server.world_size()  # refuses a server without the routes for new weights
                server.close()
                del waiting[url]
        if waiting and time.monotonic() > deadline:
            logs = "".join(f"; log {by_url[url].log}" for url in waiting if url in by_url)
            raise UserError(
                f"rollout server {', '.join(waiting)} does not answer after {vllm.start_timeout} s{logs}: start it, "
                "correct model.ppo.vllm.servers, or raise model.ppo.vllm.start_timeout."
            )
        time.sleep(READY_POLL_SECONDS if waiting else 0.0)
    return urls


def _transport(cfg: PpoConfig, actor: Model, folder: Path) -> Transport:
    vllm, dtype = cfg.model.ppo.vllm, actor.precision.params_dtype
    if _backend(cfg) != "nccl":
        return FileTransport(Path(vllm.sync_dir) if vllm.sync_dir else folder / "weights")
    from her_nemo.rollout.vllm_nccl import NcclTransport

    sizes = hf_shapes(actor.shape, "lm")
    order = [name for whole in wholes(actor.shape, "lm") for name in whole.entry.names]
    address = socket.gethostbyname(socket.gethostname()) if vllm.servers else LOOPBACK
    return NcclTransport(address, {name: sizes[name] for name in order}, dtype)


def _log_probs(actor: Model, rows: list[list[int]]) -> list[list[float]]:
    """The trainer's log-prob of every token but the first of rows of one length (collective over a replica)."""
    found = forward.log_probs(actor, [{"tokens_BS": torch.tensor(rows)}])
    return torch.cat(found).tolist()
