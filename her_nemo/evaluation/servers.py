"""vLLM servers for the roles that a checkpoint plays: one for each checkpoint, however many roles it has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from her_nemo.config.evaluation import ChatModel, ServerKeys
from her_nemo.evaluation.endpoint import fingerprint

Identities = dict[str, dict[str, str]]


@contextlib.contextmanager
def served(
    roles: Mapping[str, ChatModel], keys: ServerKeys, logs: Path
) -> Iterator[tuple[dict[str, ChatModel], Identities]]:
    """(the roles with an endpoint each, and the identities of those that a server was started for).

    The servers end when the block is left, or when this process dies. Without checkpoints nothing is started, and
    neither vLLM nor torch is imported.

    Raises:
        UserError: vLLM is not installed, there are too few GPUs, or a server does not come up.
    """
    checkpoints = list(dict.fromkeys(chat.checkpoint for chat in roles.values() if chat.checkpoint is not None))
    if not checkpoints:
        yield dict(roles), {}
        return
    from her_nemo.rollout.vllm_chat_server import ChatServerOptions, chat_server
    from her_nemo.rollout.vllm_server import gpus_after

    gpus = gpus_after(0, len(checkpoints), keys.tensor_parallel_size, os.environ)
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[str, str]] = {}
        for number, checkpoint in enumerate(checkpoints):
            options = ChatServerOptions(
                model=Path(checkpoint),
                name=Path(checkpoint).resolve().name,
                dtype=keys.dtype,
                max_model_len=keys.max_model_len,
                max_num_seqs=keys.max_num_seqs,
                tensor_parallel_size=keys.tensor_parallel_size,
                gpu_memory_utilization=keys.gpu_memory_utilization,
            )
            print(f"starting vLLM for {checkpoint}; its log is {logs / f'server_{number}.log'}", flush=True)
            server = stack.enter_context(
                chat_server(
                    options, logs / f"server_{number}.log", gpus=gpus[number], seconds=keys.start_seconds
                )
            )
            places[checkpoint] = (server.endpoint, options.name)
        found, identities = {}, {}
        for role, chat in roles.items():
            found[role] = chat
            if chat.checkpoint is not None:
                endpoint, name = places[chat.checkpoint]
                found[role] = chat.model_copy(update={"endpoint": endpoint, "model": name, "api_key_env": None})
                # Its address changes from run to run; what it answers does not.
                identities[role] = {"model": name, "fingerprint": fingerprint(chat.checkpoint), "dtype": keys.dtype}
        yield found, identities


def instead(chat: ChatModel, other: ChatModel) -> ChatModel:
    """`chat` if it says who answers, else the model of `other` with the sampling of `chat`."""
    if chat.given:
        return chat
    place = ("endpoint", "model", "checkpoint", "api_key_env", "revision", "extra_body")
    return chat.model_copy(update={name: getattr(other, name) for name in place})
