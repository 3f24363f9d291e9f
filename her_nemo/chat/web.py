"""`her-nemo chat --web`: the same conversation on a page of this machine. The page draws; all rules are here.

One person, one conversation. A call that changes it names the revision it was made on, and is refused where that is not
the present one: two tabs cannot edit each other's turns.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from her_nemo.chat.exports import RowFiles, pair_row
from her_nemo.chat.players import Players, Progress
from her_nemo.chat.scenes import Scene
from her_nemo.chat.session import ChatSession, Shown, pieces_of, pieces_so_far, problem_of
from her_nemo.chat.web_guard import Guard, known_hosts
from her_nemo.config.chat import ChatConfig
from her_nemo.config.errors import UserError
from her_nemo.roleplay.layouts import Layout

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
LARGEST_BODY = 1 << 20  # bytes
MIN_SECONDS_BETWEEN_PIECES = 0.04


class _Refused(Exception):
    """A call that is not carried out: status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class ChatRoom:
    """What the page talks to."""

    cfg: ChatConfig
    scenes: Sequence[Scene]
    players: Players
    files: RowFiles
    session: ChatSession | None = None
    busy: bool = False
    listening: asyncio.Task[None] | None = None  # to the reply that is coming in

    # ------------------------------------------------------------ what is shown

    def state(self) -> dict[str, Any]:
        """Everything the page shows of the conversation."""
        session = self.session
        if session is None:
            return {"session": None}
        return {
            "session": {
                "id": session.session_id,
                "revision": session.revision,
                "title": session.scene.title,
                "book": session.scene.book,
                "setting": session.scene.setting,
                "lead": session.lead,
                "others": list(session.others),
                "next": session.next_speaker(),
                "busy": self.busy,
                "turns": [self._turn(session, number) for number in range(len(session.turns))],
            }
        }

    def _turn(self, session: ChatSession, number: int) -> dict[str, Any]:
        turn = session.turns[number]
        return {
            "speaker": turn.speaker,
            "lead": session.is_lead(turn.speaker),
            "chosen": turn.chosen,
            "text": turn.text,
            "problem": problem_of(session, turn),
            "candidates": [
                {
                    "author": candidate.author.value,
                    "finished": candidate.finished,
                    "pieces": drawn(pieces_of(turn.speaker, candidate.text)),
                }
                for candidate in turn.candidates
            ],
        }

    def scene_list(self) -> dict[str, Any]:
        """What there is to choose from."""
        return {
            "scenes": [
                {
                    "title": scene.title,
                    "book": scene.book,
                    "setting": scene.setting,
                    "turns": len(scene.history),
                    "parts": [{"name": part.name, "begins_at": part.begins_at} for part in scene.parts],
                }
                for scene in self.scenes
            ],
            "scene": self.cfg.scene,
            "character": self.cfg.character,
            "turns": self.cfg.turns,
            "model": self.players.lead.model,
            "partner": None if self.players.own_partner else self.players.partner.model,
            "samples": str(self.files.samples),
            "pairs": str(self.files.pairs),
        }

    # ------------------------------------------------------------ what is done

    def begin(self, given: dict[str, Any]) -> dict[str, Any]:
        """Another conversation."""
        number = _number(given, "scene")
        if number >= len(self.scenes):
            raise UserError(f"there is no scene {number}: there are {len(self.scenes)}")
        self.session = ChatSession.begin(
            self.scenes[number],
            _text(given, "character"),
            f"s{secrets.token_hex(4)}",
            turns=None if given.get("turns") is None else _number(given, "turns"),
            layout=Layout(self.cfg.layout),
            own_partner=self.players.own_partner,
        )
        return self.state()

    def change(self, verb: str, given: dict[str, Any]) -> dict[str, Any]:
        """One of the calls that need no model: say, edit, choose, rewind, prefer, export."""
        session = self.current(given)
        said: dict[str, Any] = {}
        if verb == "say":
            session.say(_text(given, "speaker"), _text(given, "text"))
        elif verb == "edit":
            session.edit(_number(given, "turn"), _text(given, "text"))
        elif verb == "choose":
            session.choose(_number(given, "turn"), _number(given, "candidate"))
        elif verb == "rewind":
            session.rewind(_number(given, "turns"))
        elif verb == "prefer":
            number, better = _number(given, "turn"), _number(given, "candidate")
            row = pair_row(session, number, better, _number(given, "over"))
            said = {"pairs": self.files.write_pair(row)}
            session.choose(number, better)
        else:
            count, left_out = self.files.write_samples(session)
            said = {"samples": count, "left_out": [{"turn": i.turn, "reason": i.reason} for i in left_out]}
        return self.state() | said

    def current(self, given: dict[str, Any]) -> ChatSession:
        """The conversation, if the call was made on it as it is.

        Raises:
            _Refused: it was not, or a reply is coming in.
        """
        if self.session is None:
            raise _Refused(409, "no conversation was begun")
        if self.busy:
            raise _Refused(409, "a reply is coming in: stop it first")
        if given.get("session") != self.session.session_id or given.get("revision") != self.session.revision:
            raise _Refused(409, "the conversation was changed elsewhere meanwhile; this page shows it as it is now")
        return self.session

    async def reply(self, session: ChatSession, given: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """A model's turn, piece by piece, and at the end the state: a new turn, or another text of turn `turn`.

        What came before a stop is kept, as a text that was cut off.
        """
        number = None if given.get("turn") is None else _number(given, "turn")
        speaker = session.spelt(_text(given, "speaker")) if number is None else session.turn(number).speaker
        coming: asyncio.Queue[Progress | None] = asyncio.Queue()
        # A task of its own: a tab that is closed cancels this answer anywhere, which an open reply does not survive.
        self.listening = asyncio.create_task(self._listen(session, speaker, number, coming))
        listening, latest, shown = self.listening, Progress(""), 0.0
        clock = asyncio.get_running_loop().time
        try:
            while (progress := await coming.get()) is not None:
                latest = progress
                if latest.finished is not None or clock() - shown >= MIN_SECONDS_BETWEEN_PIECES:
                    shown = clock()
                    yield {"pieces": drawn(pieces_so_far(speaker, latest.text)), "dropped": latest.dropped}
            await asyncio.wait({listening})
            stopped = listening.cancelled()
            if not stopped:
                listening.result()
            if not latest.text.strip():
                yield {"error": "stopped" if stopped else f"the model wrote nothing for {speaker}"}
            elif number is None:
                session.add(speaker, latest.text, finished=bool(latest.finished))
            else:
                choose, finished = bool(given.get("choose", True)), bool(latest.finished)
                session.add_alternative(number, latest.text, finished=finished, choose=choose)
        except UserError as error:
            yield {"error": str(error)}
        finally:
            listening.cancel()
            self.busy = False
        yield self.state()

    async def _listen(
        self, session: ChatSession, speaker: str, number: int | None, coming: asyncio.Queue[Progress | None]
    ) -> None:
        """Puts a reply into a queue as it comes, and None at its end."""
        try:
            async with aclosing(self.players.play(session, speaker, number)) as pieces:
                async for progress in pieces:
                    coming.put_nowait(progress)
        finally:
            coming.put_nowait(None)

    def stop(self) -> None:
        """End the reply that is coming in."""
        if self.listening is not None:
            self.listening.cancel()


def drawn(pieces: Sequence[Shown]) -> list[dict[str, Any]]:
    """Pieces as the page takes them."""
    return [{"kind": piece.kind.value, "text": piece.text, "folded": piece.folded} for piece in pieces]


def _number(given: dict[str, Any], key: str) -> int:
    value = given.get(key)
    if type(value) is not int or value < 0:
        raise _Refused(400, f"{key!r} has to be a whole number, 0 or more")
    return value


def _text(given: dict[str, Any], key: str) -> str:
    value = given.get(key)
    if not isinstance(value, str):
        raise _Refused(400, f"{key!r} has to be text")
    return value


# ---------------------------------------------------------------- HTTP


async def _given(request: Request) -> dict[str, Any]:
    """The JSON object that a call brings."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise _Refused(415, "a call brings application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise _Refused(413, "that is too much text for one call")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "not JSON") from None
    if not isinstance(given, dict):
        raise _Refused(400, "not a JSON object")
    return given


def _answering(act: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """What goes wrong becomes an answer that says so."""

    async def answer(request: Request) -> Response:
        try:
            return await act(request)
        except _Refused as refused:
            return JSONResponse({"error": str(refused)}, refused.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    return answer


class _Reply(StreamingResponse):
    """A reply as it comes. However it ends, the room is free again afterwards."""

    def __init__(self, room: ChatRoom, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.room.busy = False


def application(room: ChatRoom) -> Starlette:
    """The routes, without the guard."""

    async def page(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return Response(resources.files(__package__).joinpath("page", name).read_bytes(), media_type=kind)

    async def state(request: Request) -> Response:
        return JSONResponse(room.state())

    async def scenes(request: Request) -> Response:
        return JSONResponse(room.scene_list())

    async def begin(request: Request) -> Response:
        if room.busy:
            raise _Refused(409, "a reply is coming in: stop it first")
        return JSONResponse(room.begin(await _given(request)))

    async def change(request: Request) -> Response:
        return JSONResponse(room.change(request.url.path.removeprefix("/api/"), await _given(request)))

    async def stop(request: Request) -> Response:
        room.stop()
        return JSONResponse({})

    async def reply(request: Request) -> Response:
        given = await _given(request)
        session = room.current(given)
        room.busy = True

        async def lines() -> AsyncIterator[str]:
            async with aclosing(room.reply(session, given)) as items:
                async for item in items:
                    yield json.dumps(item, ensure_ascii=False) + "\n"

        return _Reply(room, lines())

    changes = ("say", "edit", "choose", "rewind", "prefer", "export")
    return Starlette(
        routes=[
            *(Route(path, page) for path in FILES),
            Route("/api/state", _answering(state)),
            Route("/api/scenes", _answering(scenes)),
            Route("/api/begin", _answering(begin), methods=["POST"]),
            Route("/api/stop", _answering(stop), methods=["POST"]),
            Route("/api/reply", _answering(reply), methods=["POST"]),
            *(Route(f"/api/{verb}", _answering(change), methods=["POST"]) for verb in changes),
        ]
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; port=0 takes any port that is free"
        ) from error
    return listening


async def serve(room: ChatRoom, listening: socket.socket, host: str, token: str) -> None:
    """Answer until the process is told to stop."""
    port = listening.getsockname()[1]
    app = Guard(application(room), known_hosts(host, port), token, FILES)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=2,
        server_header=False,
    )  # fmt: skip
    await uvicorn.Server(config).serve(sockets=[listening])
