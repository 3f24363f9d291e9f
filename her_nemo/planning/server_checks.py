"""What several checks ask of servers: their addresses, and room for a prompt. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from her_nemo.config.architecture import Shape
from her_nemo.config.chat import ChatConfig
from her_nemo.config.errors import Problem
from her_nemo.config.judge import JudgeConfig
from her_nemo.config.schema import EvaluateConfig


def addresses(key: str, urls: Sequence[str], pattern: str, *, what: str, hint: str) -> Iterator[Problem]:
    """Entries that `pattern` does not match whole (they are no `what`), and servers that are named twice."""
    for index, url in enumerate(urls):
        if not re.fullmatch(pattern, url):
            yield Problem(key, f"entry {index}, {url!r}, is no {what}", hint=hint)
    if len({url.rstrip("/") for url in urls}) < len(urls):
        yield Problem(key, "names a server twice", hint="name each once")


def room_for_a_prompt(config: ChatConfig | EvaluateConfig | JudgeConfig, shape: Shape) -> Iterator[Problem]:
    """A reply as long as the model's length leaves nothing for what it answers."""
    limit = config.max_model_len or shape.get("max_position_embeddings")
    if limit is not None and config.sampling.max_tokens >= limit:
        text = f"{config.sampling.max_tokens} leaves no room for a prompt in {limit} tokens"
        yield Problem("sampling.max_tokens", text, hint="make it smaller")
