"""What can be known of a benchmark before any endpoint is asked: files, addresses, keys, numbers that do not agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from her_nemo.config.errors import Problem
from her_nemo.config.evaluation import BenchmarkConfig, ChatModel, CoserConfig


def coser(config: CoserConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Problems of `evaluate benchmark=coser`. Endpoints are not asked: they need not be up yet."""
    yield from shared(config)
    if not Path(config.scenes).is_file():
        hint = "give CoSER's test_set.json, or a file of the same form"
        yield Problem("scenes", f"{config.scenes}: no such file", hint=hint)
    if config.continue_from >= config.max_rounds:
        said = f"{config.continue_from} messages are given and max_rounds is {config.max_rounds}: nothing is played"
        yield Problem("continue_from", said, hint="raise max_rounds or lower continue_from")
    if config.retrieval != "none":
        yield from _books(config)
    if config.prompts_dir is not None and not Path(config.prompts_dir).is_dir():
        yield Problem("prompts_dir", f"{config.prompts_dir}: no such directory", hint="leave it out, or mend the path")
    yield from role("actor", config.actor, environment, needed=True)
    yield from role("judge", config.judge, environment, needed=True)
    yield from role("environment", config.environment, environment)
    yield from role("next_speaker", config.next_speaker, environment)


def _books(config: CoserConfig) -> Iterator[Problem]:
    if config.protocol == "her":
        said = "HER's fork has no retrieval"
        yield Problem("retrieval", said, hint="take protocol=fixed or upstream, or retrieval=none")
    if config.books is None:
        yield Problem("books", "has to be given with retrieval", hint="give the directory of CoSER's BOOK.json files")
    elif not Path(config.books).is_dir():
        yield Problem("books", f"{config.books}: no such directory", hint="give the directory of the BOOK.json files")


def shared(config: BenchmarkConfig) -> Iterator[Problem]:
    """Problems of the keys that all benchmarks have."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        yield Problem("out", f"{out}: is a file, but a directory is to be written here", hint="give another path")


def role(
    name: str, chat: ChatModel, environment: Mapping[str, str], *, needed: bool = False
) -> Iterator[Problem]:
    """Problems of one role: who answers, and how he is reached."""
    if needed and not chat.given:
        hint = f"give {name}.endpoint=http://localhost:8000/v1 or {name}.checkpoint=DIR"
        yield Problem(f"{name}.endpoint", "has to be given, or a checkpoint", hint=hint)
    if chat.endpoint is not None and chat.checkpoint is not None:
        said = "both an endpoint and a checkpoint are given"
        yield Problem(f"{name}.checkpoint", said, hint="leave one of them out")
    if chat.endpoint is not None:
        url = urlsplit(chat.endpoint)
        if url.scheme not in ("http", "https") or not url.netloc:
            hint = "give a base URL such as http://localhost:8000/v1"
            yield Problem(f"{name}.endpoint", f"{chat.endpoint}: not the address of an endpoint", hint=hint)
    if chat.checkpoint is not None and not (Path(chat.checkpoint) / "config.json").is_file():
        hint = "give a Hugging Face directory (her-nemo export writes one)"
        yield Problem(f"{name}.checkpoint", f"{chat.checkpoint}: has no config.json", hint=hint)
    if chat.api_key_env is not None and not environment.get(chat.api_key_env):
        hint = f"export {chat.api_key_env}=..., or leave it out for an endpoint without keys"
        yield Problem(f"{name}.api_key_env", f"{chat.api_key_env}: this environment variable is not set", hint=hint)
