"""A vLLM server of one checkpoint with the OpenAI API: chat completions, streamed or whole.

Unlike the rollout servers of `vllm_server` it loads the weights and the tokenizer of a Hugging Face directory. It
always writes prompts with our chat template, the one the model was trained with.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import torch

from her_nemo.config.errors import UserError
from her_nemo.rollout.vllm_engine import cpu_cache_bytes, read_hf_config, require_vllm
from her_nemo.rollout.vllm_server import LOOPBACK, ServerProcess, free_port, passed_on

POLL_SECONDS = 0.5
_HEALTH_TIMEOUT = 5.0


@dataclass(frozen=True)
class ChatServerOptions:
    """What a chat server is started with.

    Attributes:
        model: Hugging Face directory with weights and tokenizer.
        name: what the model is called in requests.
        dtype: vLLM's dtype, or "auto": float32 on CPU, on CUDA half.
        max_model_len: longest prompt plus reply, tokens; None takes the model's `max_position_embeddings`.
        max_num_seqs: sequences decoded together.
        tensor_parallel_size: GPUs (or CPU processes) the model is cut over.
        gpu_memory_utilization: share of a GPU's memory to take; unused on CPU.
    """

    model: Path
    name: str
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9


def chat_command(options: ChatServerOptions, port: int, host: str = LOOPBACK) -> list[str]:
    """The command line of one server.

    Raises:
        UserError: the model's directory cannot be read, or its heads are of a size that vLLM lacks on CPU.
    """
    config = read_hf_config(options.model)
    length = options.max_model_len or int(config["max_position_embeddings"])
    on_cuda = torch.cuda.is_available()
    dtype = options.dtype
    if dtype == "auto" and not on_cuda:
        dtype = "float32"
    template = resources.files("her_nemo.roleplay").joinpath("chat_template.jinja")
    words: list[Any] = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model,
        "--served-model-name", options.name, "--host", host, "--port", port, "--chat-template", template,
        "--dtype", dtype, "--max-model-len", length, "--max-num-seqs", options.max_num_seqs,
        "--tensor-parallel-size", options.tensor_parallel_size,
        # A checkpoint's generation_config.json would change the sampling behind our back.
        "--generation-config", "vllm",
        # Held to a schema, a weak model would otherwise write blanks for ever.
        "--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if on_cuda:
        words += ["--gpu-memory-utilization", options.gpu_memory_utilization]
    else:
        cache = cpu_cache_bytes(options.model, config, options.max_num_seqs, length)
        words += ["--enforce-eager", "--kv-cache-memory-bytes", cache]
        # A prompt cut over two steps rewinds its sample's generator, which fails for one on the CPU.
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", max(4096, length)]
    return [str(word) for word in words]


class ChatServer(ServerProcess):
    """One chat server started here, with its guard (`server_guard`) and its log."""

    def __init__(self, options: ChatServerOptions, log: Path, gpus: Sequence[str] = ()) -> None:
        require_vllm()
        self.options = options
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        variables = passed_on(os.environ, options.tensor_parallel_size, gpus)
        self._start(chat_command(options, self.port), variables, log)

    @property
    def endpoint(self) -> str:
        """The base URL of the OpenAI API."""
        return f"{self.url}/v1"

    def wait(self, seconds: float, waiting: Callable[[float], None] | None = None) -> None:
        """Return when it can serve. `waiting` is told the seconds gone by, now and then.

        Raises:
            UserError: it ended, or is not up after `seconds`; with the end of its log.
        """
        begun = time.monotonic()
        with httpx.Client(trust_env=False, timeout=_HEALTH_TIMEOUT) as client:
            while (gone := time.monotonic() - begun) < seconds:
                if (end := self.ended()) is not None:
                    raise UserError(f"the vLLM server of {self.options.model} {end}")
                with contextlib.suppress(httpx.TransportError):  # not listening yet
                    if client.get(f"{self.url}/health").is_success and self._is_mine(client):
                        return
                if waiting is not None:
                    waiting(gone)
                time.sleep(POLL_SECONDS)
        model = self.options.model
        raise UserError(f"the vLLM server of {model} is not up after {seconds:g} s; its log is {self.log}")

    def _is_mine(self, client: httpx.Client) -> bool:
        """Whether the server at this port serves the model: another program may have taken the port first."""
        roots = [entry.get("root") for entry in client.get(f"{self.endpoint}/models").json()["data"]]
        if str(self.options.model) in roots:
            return True
        raise UserError(f"another server, of {roots}, has taken port {self.port}; start again")


@contextlib.contextmanager
def chat_server(
    options: ChatServerOptions,
    log: Path,
    *,
    gpus: Sequence[str] = (),
    seconds: float = 900.0,
    waiting: Callable[[float], None] | None = None,
) -> Iterator[ChatServer]:
    """A server that is up; ended when the block is left, or when this process dies."""
    server = ChatServer(options, log, gpus)
    try:
        server.wait(seconds, waiting)
        yield server
    finally:
        server.stop()
