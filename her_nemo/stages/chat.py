"""`her-nemo chat`: talk to a model in a scene, and keep what was said as samples and preference pairs."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from her_nemo.chat.client import ChatClient
from her_nemo.chat.exports import RowFiles
from her_nemo.chat.players import Players
from her_nemo.chat.scenes import Scene, load_scenes, miniature_scenes
from her_nemo.chat.terminal import Terminal, read_line
from her_nemo.config.chat import ChatConfig
from her_nemo.config.errors import UserError

LOG_FILE = "server.log"
SHOWN_BAD_ROWS = 3


def run(cfg: ChatConfig) -> int:
    console = Console(highlight=False)
    scenes = read_scenes(cfg, console)
    check_choice(cfg, scenes)
    with contextlib.suppress(KeyboardInterrupt), serving(cfg, console) as endpoint:
        return in_browser(cfg, scenes, endpoint) if cfg.web else in_terminal(cfg, scenes, endpoint, console)
    return 0


def read_scenes(cfg: ChatConfig, console: Console) -> list[Scene]:
    """The scenes to choose from. Rows that make none are said, not hidden."""
    if cfg.scenes is None:
        return miniature_scenes()
    paths = [cfg.scenes] if isinstance(cfg.scenes, str) else cfg.scenes
    scenes, bad = load_scenes(paths, cfg.num_scenes, plans=cfg.plans)
    if bad:
        console.print(f"{len(bad)} rows make no scene:", *bad[:SHOWN_BAD_ROWS], sep="\n  ", markup=False)
    return scenes


def check_choice(cfg: ChatConfig, scenes: Sequence[Scene]) -> None:
    """What was chosen on the command line is there.

    Raises:
        UserError: it is not.
    """
    if cfg.scene is None:
        if cfg.character is not None and not any(part.name == cfg.character for s in scenes for part in s.parts):
            raise UserError(f"character={cfg.character}: no scene has this part")
        return
    if cfg.scene >= len(scenes):
        raise UserError(f"scene={cfg.scene}: there are {len(scenes)}, 0 to {len(scenes) - 1}")
    if cfg.character is not None:
        scenes[cfg.scene].part(cfg.character)
    if cfg.turns is not None and cfg.turns > (there := len(scenes[cfg.scene].history)):
        raise UserError(f"turns={cfg.turns}: the scene has {there}")


@contextlib.contextmanager
def serving(cfg: ChatConfig, console: Console) -> Iterator[str]:
    """The base URL of the model's API; for a checkpoint, of a vLLM server that lives as long as the block."""
    if cfg.endpoint is not None:
        yield cfg.endpoint
        return
    from her_nemo.rollout.vllm_chat_server import ChatServerOptions, chat_server

    assert cfg.checkpoint is not None  # preflight
    model = Path(cfg.checkpoint).resolve()
    options = ChatServerOptions(
        model, model.name, cfg.dtype, cfg.max_model_len, tensor_parallel_size=cfg.tensor_parallel_size
    )
    log = Path(cfg.out) / LOG_FILE
    with contextlib.ExitStack() as stack:
        with console.status(f"vLLM loads {model.name} (log: {log})"):
            server = stack.enter_context(chat_server(options, log, seconds=cfg.start_seconds))
        yield server.endpoint


async def enter_players(cfg: ChatConfig, endpoint: str, stack: AsyncExitStack) -> Players:
    """The models, asked for their names: an endpoint that is not there is said before anything else.

    Raises:
        UserError: one does not answer.
    """
    lead = await stack.enter_async_context(
        ChatClient(endpoint, cfg.model, cfg.sampling, cfg.timeout_seconds, cfg.api_key_env)
    )
    await lead.find_model("model")
    if cfg.partner.endpoint is None:
        return Players(lead, lead)
    partner = await stack.enter_async_context(
        ChatClient(
            cfg.partner.endpoint, cfg.partner.model, cfg.sampling, cfg.timeout_seconds, cfg.partner.api_key_env
        )
    )
    await partner.find_model("partner.model")
    return Players(lead, partner)


def in_terminal(cfg: ChatConfig, scenes: Sequence[Scene], endpoint: str, console: Console) -> int:
    """Talk in the terminal."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            players = runner.run(enter_players(cfg, endpoint, stack))
            files = RowFiles(Path(cfg.out))
            return Terminal(cfg, scenes, players, files, runner, console, read_line).run()
        finally:
            runner.run(stack.aclose())


def in_browser(cfg: ChatConfig, scenes: Sequence[Scene], endpoint: str) -> int:
    """Serve the page until Ctrl-C."""
    from her_nemo.chat import web
    from her_nemo.chat.client import is_loopback

    listening = web.listen(cfg.host, cfg.port)
    token = secrets.token_urlsafe(18)

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            players = await enter_players(cfg, endpoint, stack)
            room = web.ChatRoom(cfg, scenes, players, RowFiles(Path(cfg.out)))
            host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
            print(f"Open http://{host}:{listening.getsockname()[1]}/#{token}  (Ctrl-C ends it)", flush=True)
            if not is_loopback(cfg.host):
                print(
                    f"her-nemo: {cfg.host} can be reached from other machines, over plain HTTP: whoever reads the "
                    "traffic reads the token too",
                    file=sys.stderr,
                )
            await web.serve(room, listening, cfg.host, token)

    with listening:
        asyncio.run(serve())
    return 0
