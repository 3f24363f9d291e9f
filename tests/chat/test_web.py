"""The page's server over real sockets: who may talk to it, what each call does, and replies while they come."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from streaming_endpoint import GOOD, Reply, StreamingEndpoint

from her_nemo.chat.web_guard import TOKEN_HEADER, known_hosts, refusal
from her_nemo.data.sources import read_rows

pytest.importorskip("starlette", reason="the page needs starlette and uvicorn: pip install 'her-nemo[web]'")
pytest.importorskip("uvicorn", reason="the page needs starlette and uvicorn: pip install 'her-nemo[web]'")

ROOT = Path(__file__).resolve().parents[2]


class Page:
    """One `her-nemo chat --web`, and a client that behaves as its page does."""

    def __init__(self, endpoint: str, out: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "her_nemo", "chat", "--web", "port=0", f"endpoint={endpoint}", f"out={out}"]
        self.process = subprocess.Popen(
            [*command, *overrides], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=out.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"Open (http://127\.0\.0\.1:(\d+))/#(\S+)", line)
        assert found, line + self.process.communicate()[1]
        self.base, self.port, self.token = found[1], int(found[2]), found[3]
        self.http = httpx.Client(base_url=self.base, headers={TOKEN_HEADER: self.token}, timeout=30, trust_env=False)
        self.session: dict[str, Any] = {}

    def call(self, verb: str, **body: Any) -> dict[str, Any]:
        """A call that must go well."""
        answer = self.post(verb, **body)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        self.session = said.get("session", self.session)
        return said

    def post(self, verb: str, **body: Any) -> httpx.Response:
        mark = {"session": self.session["id"], "revision": self.session["revision"]} if self.session else {}
        return self.http.post(f"/api/{verb}", json={**mark, **body})

    def reply(self, **body: Any) -> list[dict[str, Any]]:
        """The items of a reply."""
        answer = self.post("reply", **body)
        assert answer.status_code == 200, answer.text
        items = [json.loads(line) for line in answer.text.strip().split("\n")]
        self.session = items[-1]["session"]
        return items

    def close(self) -> int:
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        assert "Traceback" not in said, said
        return self.process.returncode


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[Page, StreamingEndpoint]]]:
    opened: list[tuple[Page, StreamingEndpoint]] = []

    def start(script=None, *overrides: str) -> tuple[Page, StreamingEndpoint]:
        endpoint = StreamingEndpoint(script).__enter__()
        page = Page(endpoint.url, tmp_path / "chat", *overrides)
        opened.append((page, endpoint))
        return page, endpoint

    yield start
    for page, endpoint in opened:
        endpoint.__exit__()
        assert page.close() == 0


def kinds(pieces: list[dict[str, Any]]) -> list[str]:
    return [piece["kind"] for piece in pieces]


# ---------------------------------------------------------------- who may talk to it


def test_the_guards_rules() -> None:
    hosts = known_hosts("127.0.0.1", 8817)
    assert hosts == {"127.0.0.1:8817", "localhost:8817", "[::1]:8817"}
    assert known_hosts("node7.cluster", 8817) == {"node7.cluster:8817"}

    def status(path: str = "/api/state", **headers: str) -> int | None:
        names = {"host": "127.0.0.1:8817", TOKEN_HEADER: "t"} | {k.replace("_", "-"): v for k, v in headers.items()}
        found = refusal(names, path, hosts, "t", ["/"])
        return found and found[0]

    assert status() is None
    assert status(origin="http://127.0.0.1:8817", sec_fetch_site="same-origin") is None
    assert status(origin="http://localhost:8817") is None
    assert status(host="LOCALHOST:8817") is None
    for wrong in (
        {"host": "evil.org:8817"},  # a name that was made to resolve to this machine
        {"host": "127.0.0.1:9"},
        {"host": ""},
        {"origin": "http://evil.org"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "https://127.0.0.1:8817"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ):
        assert status(**wrong) == 403, wrong
    assert status(**{TOKEN_HEADER.replace("-", "_"): "u"}) == 401
    assert status(**{TOKEN_HEADER.replace("-", "_"): "é"}) == 401
    assert status("/", sec_fetch_site="cross-site") is None  # a link to the page may be followed
    for path in ("//api/state", "/API/state", "/anything"):
        assert status(path, **{TOKEN_HEADER.replace("-", "_"): ""}) == 401


def test_a_foreign_page_another_user_and_another_name_are_refused(serve) -> None:
    page, endpoint = serve()
    page.call("begin", scene=0, character="Kit Holt", turns=1)
    bare = {"host": f"127.0.0.1:{page.port}"}
    body = {"speaker": "Pia Penn", "text": "x", "session": page.session["id"], "revision": 0}
    with httpx.Client(base_url=page.base, trust_env=False) as http:
        for headers, status in (
            ({}, 401),
            ({TOKEN_HEADER: "guess"}, 401),
            ({TOKEN_HEADER: page.token, "origin": "http://evil.org"}, 403),
            ({TOKEN_HEADER: page.token, "host": f"evil.org:{page.port}"}, 403),
            ({TOKEN_HEADER: page.token, "sec-fetch-site": "cross-site"}, 403),
            ({TOKEN_HEADER: page.token, "content-type": "text/plain"}, 415),  # what a form could send
        ):
            sent = {"content-type": "application/json", **bare, **headers}
            answer = http.post("/api/say", content=json.dumps(body), headers=sent)
            assert answer.status_code == status, headers
            assert "access-control-allow-origin" not in answer.headers
        assert http.get("/api/state").status_code == 401
        index = http.get("/")
        assert index.status_code == 200
        assert "default-src 'none'" in index.headers["content-security-policy"]
        assert page.token not in index.text
        for name in ("/app.js", "/style.css", "/favicon.svg"):
            assert http.get(name).status_code == 200
            assert not re.search(r"(?<!www\.w3\.org)https?://(?!www\.w3\.org)", http.get(name).text)  # works offline
        assert http.get("/web.py").status_code == 401
    assert page.http.get("/web.py").status_code == 404
    assert len(page.call("say", **body)["session"]["turns"]) == 2  # the page itself may
    assert endpoint.requests == []


def test_it_listens_on_this_machine_alone(serve) -> None:
    page, _ = serve()
    listening = {
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{page.port:04X}")
    }
    assert listening == {f"0100007F:{page.port:04X}"}


# ---------------------------------------------------------------- what each call does


def test_a_conversation(serve, tmp_path: Path) -> None:
    page, endpoint = serve(lambda request, number: Reply(GOOD.replace("drum", f"drum {number}"), seconds=0.005))
    info = page.http.get("/api/scenes").json()
    assert len(info["scenes"]) == 24
    assert info["scenes"][0]["parts"] == [{"name": "Kit Holt", "begins_at": 1}]
    assert info["model"] == "tiny"
    assert page.http.get("/api/state").json() == {"session": None}
    page.call("begin", scene=0, character="Kit Holt", turns=None)
    assert [turn["speaker"] for turn in page.session["turns"]] == ["Pia Penn"]

    items = page.reply(speaker="Kit Holt", turn=None, choose=True)
    coming = [item["pieces"] for item in items[:-1]]
    assert len(coming) > 3
    assert kinds(coming[-1]) == ["system_thinking", "role_thinking", "role_action", "speech"]
    assert [piece["folded"] for piece in coming[-1]] == [True, True, False, False]
    assert all("<" not in piece["text"] for pieces in coming for piece in pieces)
    assert page.session["turns"][1]["problem"] is None
    assert not page.session["busy"]

    page.reply(speaker="Kit Holt", turn=1, choose=False)
    turn = page.session["turns"][1]
    assert (len(turn["candidates"]), turn["chosen"]) == (2, 0)
    assert page.call("prefer", turn=1, candidate=1, over=0)["pairs"] == 1
    assert page.session["turns"][1]["chosen"] == 1
    page.call("say", speaker="Pia Penn", text="*bows* So?")
    page.reply(speaker="Pia Penn", turn=None)
    assert page.session["turns"][3]["candidates"][0]["author"] == "partner"
    page.call("rewind", turns=3)
    page.call("say", speaker="Kit Holt", text="<system_thinking>p</system_thinking>No.")
    page.call("edit", turn=3, text="<system_thinking>p</system_thinking>Kit Holt: No, no.")
    page.call("choose", turn=3, candidate=0)
    page.call("choose", turn=3, candidate=1)
    said = page.call("export")
    assert (said["samples"], said["left_out"]) == (2, [])
    rows, _ = read_rows(tmp_path / "chat" / "samples.jsonl", "sft")
    assert [row["messages"][-1]["content"] for row in rows] == [
        GOOD.replace("drum", "drum 1"),
        "<system_thinking>p</system_thinking>Kit Holt: No, no.",
    ]
    pairs, _ = read_rows(tmp_path / "chat" / "pairs.jsonl", "pairs")
    assert [pairs[0][key] for key in ("chosen", "rejected")] == [GOOD.replace("drum", f"drum {n}") for n in (1, 0)]
    assert len(endpoint.requests) == 3


def test_a_stop_keeps_what_has_come_and_hangs_up(serve) -> None:
    page, endpoint = serve(Reply("Kit Holt: " + "word " * 4000, seconds=0.02))
    page.call("begin", scene=0, character="Kit Holt", turns=1)
    body = {"session": page.session["id"], "revision": 0, "speaker": "Kit Holt", "turn": None}
    with page.http.stream("POST", "/api/reply", json=body) as answer:
        lines = answer.iter_lines()
        assert "pieces" in json.loads(next(lines))
        assert page.post("say", speaker="Pia Penn", text="x").status_code == 409  # one thing at a time
        page.http.post("/api/stop", json={})
        items = [json.loads(line) for line in lines]
    assert endpoint.hung_up.wait(10)
    page.session = items[-1]["session"]
    assert page.session["turns"][1]["problem"] == "cut off before its end"
    assert page.post("export").json()["error"] == "no turn of Kit Holt's to train on; turn 2: cut off before its end"


def test_a_tab_that_is_closed_leaves_the_room_free(serve) -> None:
    page, endpoint = serve(Reply("Kit Holt: " + "word " * 4000, seconds=0.02))
    page.call("begin", scene=0, character="Kit Holt", turns=1)
    body = {"session": page.session["id"], "revision": 0, "speaker": "Kit Holt", "turn": None}
    with page.http.stream("POST", "/api/reply", json=body) as answer:
        next(answer.iter_lines())
    assert endpoint.hung_up.wait(10)
    state = page.http.get("/api/state").json()["session"]
    assert (state["busy"], len(state["turns"])) == (False, 1)


def test_what_cannot_be_done_is_said(serve) -> None:
    page, _ = serve(Reply("out of tokens", status=429))
    assert page.post("say", speaker="Pia Penn", text="x").status_code == 409  # nothing was begun
    assert "there are 24" in page.post("begin", scene=99, character="Kit Holt").json()["error"]
    assert "can play Kit Holt" in page.post("begin", scene=0, character="Hamlet").json()["error"]
    page.call("begin", scene=0, character="Kit Holt", turns=1)
    old = dict(page.session)
    page.call("say", speaker="Pia Penn", text="One.")
    new, page.session = page.session, old
    stale = page.post("say", speaker="Pia Penn", text="Two.")
    assert (stale.status_code, "changed elsewhere" in stale.json()["error"]) == (409, True)
    page.session = new
    items = page.reply(speaker="Kit Holt")
    assert "answered 429: out of tokens" in items[0]["error"]
    assert len(items[-1]["session"]["turns"]) == 2
    for verb, body, word in (
        ("say", {"speaker": "Pia Penn", "text": " "}, "empty"),
        ("say", {"speaker": "Pia Penn"}, "'text'"),
        ("say", {"speaker": "Pia Penn", "text": "<|im_start|>system"}, "im_start"),
        ("edit", {"turn": 9, "text": "x"}, "no turn 10"),
        ("edit", {"turn": "1", "text": "x"}, "whole number"),
        ("choose", {"turn": 0, "candidate": 5}, "none is number 6"),
        ("rewind", {"turns": 50}, "there are 2"),
        ("prefer", {"turn": 0, "candidate": 0, "over": 0}, "Pia Penn's"),
        ("export", {}, "no turn of Kit Holt's"),
    ):
        answer = page.post(verb, **body)
        assert (answer.status_code, word in answer.json()["error"]) == (400, True), (verb, answer.text)
    raw = {"content-type": "application/json"}
    assert page.http.post("/api/say", content=b"[]", headers=raw).status_code == 400
    assert page.http.post("/api/say", content=b"{", headers=raw).status_code == 400
    assert page.http.post("/api/say", content=b'"' + b"x" * (1 << 20) + b'"', headers=raw).status_code == 413
    assert page.http.get("/api/say").status_code == 405


def test_a_port_that_is_taken(her_nemo) -> None:
    with socket.socket() as taken, StreamingEndpoint() as endpoint:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = her_nemo("chat", "web=true", f"port={port}", f"endpoint={endpoint.url}")
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
