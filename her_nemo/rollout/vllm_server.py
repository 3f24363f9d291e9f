"""vLLM servers for rollouts, started as child processes of this machine.

A server begins with random weights of the right shape; the first sync fills it. For a server on another machine, whose
address then goes into `model.ppo.vllm.servers`, `python -m her_nemo.rollout.vllm_server DIR --port 8000` becomes one
(slurm/servers.sh does that); with `--print` it shows the command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from her_nemo.config.errors import UserError
from her_nemo.rollout.vllm_engine import cpu_cache_bytes, read_hf_config, require_vllm

LOOPBACK = "127.0.0.1"
# Of the trainer's own rendezvous and launcher: a server is not one of its ranks.
_NOT_PASSED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "GLOO_SOCKET_IFNAME", "HER_NEMO_ERROR_DIR",
)  # fmt: skip
_TERM_SECONDS = 20.0
_TAIL_BYTES = 3000


@dataclass(frozen=True)
class ServerOptions:
    """What one server is started with.

    Attributes:
        model: directory with the config.json of the policy; no weights are read.
        dtype: vLLM's dtype, that of the trainer's parameters.
        max_model_len: longest prompt plus reply, tokens.
        max_num_seqs: sequences decoded together.
        tensor_parallel_size: GPUs (or CPU processes) one server is cut over.
        gpu_memory_utilization: share of a GPU's memory to take; unused on CPU.
        prefix_caching: keep the keys and values of shared prompts; reset at every sync.
        backend: of vLLM's weight transfer: `nccl` or `her_nemo_files`.
        sleeps: it has to give its GPU's memory away when it is told to; on CPU there is nothing to give.
    """

    model: Path
    dtype: str
    max_model_len: int
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    prefix_caching: bool
    backend: str
    sleeps: bool = False


def command(options: ServerOptions, port: int, host: str = LOOPBACK) -> list[str]:
    """The command line of one server."""
    on_cuda = torch.cuda.is_available()
    words: list[Any] = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
        "--host", host, "--port", port, "--skip-tokenizer-init", "--tokens-only", "--load-format", "dummy",
        "--dtype", options.dtype, "--max-model-len", options.max_model_len, "--max-num-seqs", options.max_num_seqs,
        "--tensor-parallel-size", options.tensor_parallel_size,
        # Log-probs of what was really drawn, the temperature included.
        "--logprobs-mode", "processed_logprobs",
        # A checkpoint's generation_config.json would change the sampling behind our back.
        "--generation-config", "vllm",
        "--worker-extension-cls", "her_nemo.rollout.vllm_worker.WeightReceiver",
        "--weight-transfer-config", json.dumps({"backend": options.backend}),
        "--enable-prefix-caching" if options.prefix_caching else "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if on_cuda:
        words += ["--gpu-memory-utilization", options.gpu_memory_utilization]
        words += ["--enable-sleep-mode"] if options.sleeps else []
    else:
        config = read_hf_config(options.model)
        cache = cpu_cache_bytes(options.model, config, options.max_num_seqs, options.max_model_len)
        words += ["--enforce-eager", "--kv-cache-memory-bytes", cache]
        # A prompt cut over two steps rewinds its sample's generator, which fails for one on the CPU.
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", max(4096, options.max_model_len)]
    return [str(word) for word in words]


def environment(options: ServerOptions, given: Mapping[str, str], gpus: Sequence[str] = ()) -> dict[str, str]:
    """The variables of a rollout server."""
    # The weight-transfer routes exist in development mode only.
    return passed_on(given, options.tensor_parallel_size, gpus) | {"VLLM_SERVER_DEV_MODE": "1"}


def passed_on(
    given: Mapping[str, str], tensor_parallel_size: int, gpus: Sequence[str] = ()
) -> dict[str, str]:
    """The variables of any server: ours, less what makes a rank, plus what vLLM needs. The user's values are kept."""
    kept = {name: value for name, value in given.items() if name not in _NOT_PASSED}
    source = str(Path(__file__).resolve().parents[2])
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    if not torch.cuda.is_available():
        wanted |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        # Two helpers of the sampler would be compiled by a C++ compiler while the first request waits.
        wanted["TORCHDYNAMO_DISABLE"] = "1"
        if tensor_parallel_size == 1:
            wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker inside the engine core: a process less
    found = wanted | kept
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [source, kept.get("PYTHONPATH", "")]))
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return found


def gpus_after(first: int, count: int, each: int, given: Mapping[str, str]) -> list[list[str]]:
    """Which GPUs each of `count` servers gets: those after the trainer's own `first` (0 where they share those); none
    on CPU.

    Raises:
        UserError: there are fewer.
    """
    if not torch.cuda.is_available():
        return [[] for _ in range(count)]
    visible = given.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    needed = first + count * each
    if len(names) < needed:
        raise UserError(
            f"model.ppo.vllm.num_servers={count} of {each} GPU(s) beside {first} of the trainer's need {needed} "
            f"GPUs, and {len(names)} are visible: lower trainer.devices or num_servers, or give "
            "model.ppo.vllm.servers on other machines."
        )
    return [names[first + index * each : first + (index + 1) * each] for index in range(count)]


class ServerProcess:
    """One server started here, with its guard (`server_guard`) and its log."""

    def __init__(self, options: ServerOptions, log: Path, gpus: Sequence[str] = ()) -> None:
        require_vllm()
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._start(command(options, self.port), environment(options, os.environ, gpus), log)

    def _start(self, words: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "her_nemo.rollout.server_guard", *words],
                env=variables, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Process id of the guard; the server is its child."""
        return self._guard.pid

    def ended(self) -> str | None:
        """How it ended, with the last of its log; None while it runs."""
        code = self._guard.poll()
        if code is None:
            return None
        tail = self.log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")
        return f"ended with exit code {code}; the end of {self.log}:\n{tail}"

    def tell(self) -> None:
        """Ask the guard to end the server, without waiting."""
        if self._guard.poll() is None:
            self._guard.terminate()

    def stop(self) -> None:
        """End the server and all it started."""
        self.tell()
        try:
            self._guard.wait(_TERM_SECONDS)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()


@contextlib.contextmanager
def started(options: ServerOptions, logs: Path, gpus: Sequence[Sequence[str]]) -> Iterator[list[ServerProcess]]:
    """A server for each entry of `gpus`, all started at once; ended when the block is left."""
    running: list[ServerProcess] = []
    try:
        for index, mine in enumerate(gpus):
            running.append(ServerProcess(options, logs / f"server_{index}.log", mine))
        yield running
    finally:
        for process in running:
            process.tell()
        for process in running:
            process.stop()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m her_nemo.rollout.vllm_server`."""
    on_cuda = torch.cuda.is_available()
    found = argparse.ArgumentParser(
        prog="python -m her_nemo.rollout.vllm_server",
        description="Serve rollouts of PPO (model.ppo.vllm.servers). What is not known here goes to vLLM as it is.",
    )
    found.add_argument("model", type=Path, help="directory with the policy's config.json; its weights are not read")
    found.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all of this machine's)")
    found.add_argument("--port", type=int, default=8000)
    found.add_argument("--dtype", default="bfloat16" if on_cuda else "float32", help="that of the trainer's parameters")
    found.add_argument("--max-model-len", type=int, help="tokens of prompt and reply (default: the model's)")
    found.add_argument("--max-num-seqs", type=int, default=64 if on_cuda else 16)
    found.add_argument("--tensor-parallel-size", type=int, default=1)
    found.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    found.add_argument("--prefix-caching", action="store_true")
    found.add_argument("--sync", choices=("files", "nccl"), default="nccl" if on_cuda else "files")
    found.add_argument("--print", action="store_true", help="show variables and command, and start nothing")
    return found


def main(arguments: Sequence[str]) -> int:
    """Become a server for the model in a directory, or print how to start one. Exit code 2 for a wrong directory."""
    given, further = parser().parse_known_args(arguments)
    try:
        require_vllm()
        options = ServerOptions(
            model=given.model,
            dtype=given.dtype,
            max_model_len=given.max_model_len or int(read_hf_config(given.model)["max_position_embeddings"]),
            max_num_seqs=given.max_num_seqs,
            tensor_parallel_size=given.tensor_parallel_size,
            gpu_memory_utilization=given.gpu_memory_utilization,
            prefix_caching=given.prefix_caching,
            backend="nccl" if given.sync == "nccl" else "her_nemo_files",
        )
        words = [*command(options, given.port, host=given.host), *further]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.print:
        variables = environment(options, {})
        named = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items()))
        print(f"{named} {shlex.join(words)}")
    else:
        os.execvpe(words[0], words, environment(options, os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
