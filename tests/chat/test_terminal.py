"""The terminal as a person has it: a pty, keys, colours, Ctrl-C; and as a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from streaming_endpoint import GOOD, Reply, StreamingEndpoint

from her_nemo.cli import main
from her_nemo.data.sources import read_rows

ROOT = Path(__file__).resolve().parents[2]
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")


def as_of_a_login() -> None:
    """The pty is the child's terminal, and Ctrl-C reaches it: a job in the background inherits SIGINT ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`her-nemo chat` under a pty of 100 columns."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, endpoint: str, out: Path, *overrides: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [sys.executable, "-m", "her_nemo", "chat", f"endpoint={endpoint}", f"out={out}", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):  # they would go before the pty's own size
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=out.parent, start_new_session=True,
            preexec_fn=as_of_a_login,
        )  # fmt: skip
        os.close(slave)
        self.started.append(self.process)
        self.raw = ""
        self.read_to = 0  # how much of the text was waited for already

    @property
    def text(self) -> str:
        """Everything said so far, without colours."""
        return _ANSI.sub("", self.raw)

    def until(self, words: str, seconds: float = 60) -> str:
        """Wait for words that were not there at the last call; what came up to them."""
        deadline = time.monotonic() + seconds
        while (at := self.text.find(words, self.read_to)) < 0:
            if time.monotonic() > deadline or not self._more(deadline):
                raise AssertionError(f"{words!r} did not come; since the last: {self.text[self.read_to :]}")
        came = self.text[self.read_to : at + len(words)]
        self.read_to = at + len(words)
        return came

    def _more(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
        try:
            got = os.read(self.master, 65536) if ready else b""
        except OSError:
            got = b""  # the other end is closed
        self.raw += got.decode("utf-8", "replace")
        return bool(got)

    def say(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def keys(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self) -> int:
        while self._more(time.monotonic() + 30):
            pass
        os.close(self.master)
        return self.process.wait(30)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that failed half way leaves no process."""
    yield
    while Terminal.started:
        process = Terminal.started.pop()
        if process.poll() is None:
            process.kill()
            process.wait(30)


@pytest.fixture
def endpoint() -> Iterator[StreamingEndpoint]:
    with StreamingEndpoint(lambda request, number: Reply(GOOD.replace("drum", f"drum {number}"))) as server:
        yield server


def test_a_conversation_under_a_pty(endpoint: StreamingEndpoint, tmp_path: Path) -> None:
    terminal = Terminal(endpoint.url, tmp_path / "chat")
    terminal.until("Which scene? [0]")
    terminal.say("")
    terminal.until("You are Pia Penn.")
    said = terminal.until("Pia Penn> ")
    assert "[plan] [thought] *nods* Listen, the drum 0 is mine." in said
    assert "mask" not in terminal.text  # folded all the while it came in

    terminal.say("/show all")
    shown = terminal.until("no reader is meant")
    assert "plan: Pia Penn pries. Kit Holt is calm." in shown
    assert "(I hide the mask.)" in shown
    terminal.say("/show nothing")
    terminal.until("Pia Penn> ")

    terminal.say("*bows* I only ask.")
    terminal.until("the drum 1 is mine.")
    assert endpoint.requests[1]["messages"][-1]["content"] == "Pia Penn: <role_action>bows</role_action> I only ask."
    terminal.until("Pia Penn> ")
    terminal.say("/ab")
    asked = terminal.until("n for neither: ")
    left, right = (re.search(r"drum \d", part)[0] for part in re.findall(r"drum \d", asked)[-2:])
    assert {left, right} == {"drum 1", "drum 2"}
    terminal.say("a" if left == "drum 2" else "b")
    terminal.until("Kept: 1 pair in")
    pairs, _ = read_rows(tmp_path / "chat" / "pairs.jsonl", "pairs")
    assert "drum 2" in pairs[0]["chosen"]
    assert "drum 1" in pairs[0]["rejected"]

    terminal.say("/again")
    terminal.until("3 of 3")
    terminal.say("/use 1")
    terminal.until("1 of 3")
    terminal.say("/lead *shrugs* Enough.")
    terminal.until("*shrugs* Enough.")
    terminal.say("/partner")
    terminal.until("drum 4 is mine.")  # the scripted server gives every speaker the same words
    terminal.say("/edit #5 Kit Holt: Enough of it.")
    terminal.until("edited by you")
    terminal.say("/export")
    terminal.until("3 samples in")
    rows, _ = read_rows(tmp_path / "chat" / "samples.jsonl", "sft")
    assert [row["written_by"] for row in rows] == ["model", "model", "edit"]
    terminal.say("/back 4")
    terminal.until("2 turns are left.")
    terminal.say("/quit")
    assert terminal.end() == 0


def test_the_line_to_mend_can_be_edited_in_place(endpoint: StreamingEndpoint, tmp_path: Path) -> None:
    terminal = Terminal(endpoint.url, tmp_path / "chat", "scene=0")
    terminal.until("Pia Penn> ")
    terminal.say("/edit")
    terminal.until("mend> ")
    terminal.keys(b"\x05\x7f\x7f\x7f\x7f\x7f")  # Ctrl-E, then five backspaces
    terminal.say("yours.")
    terminal.until("drum 0 is yours.")
    terminal.until("Pia Penn> ")
    terminal.keys(b"\x04")  # Ctrl-D
    terminal.until("Until next time.")
    assert terminal.end() == 0


def test_ctrl_c_stops_a_reply_and_nothing_else(tmp_path: Path) -> None:
    with StreamingEndpoint(Reply("Kit Holt: " + "word " * 4000, seconds=0.02)) as server:
        terminal = Terminal(server.url, tmp_path / "chat", "scene=0")
        terminal.until("word word")
        terminal.keys(b"\x03")
        terminal.until("cut off before its end")
        assert server.hung_up.wait(60)
        terminal.until("Pia Penn> ")
        terminal.keys(b"\x03")
        terminal.until("/quit leaves")
        terminal.say("/back")
        terminal.until("1 turn is left.")
        terminal.say("/quit")
        assert terminal.end() == 0


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(tmp_path: Path) -> None:
    def script(request, number: int) -> Reply:
        return Reply("busy", status=503) if number == 0 else Reply("Kit Holt: \x1b[31m\x07red\x9b2J\u202e here.")

    with StreamingEndpoint(script) as server:
        terminal = Terminal(server.url, tmp_path / "chat", "scene=0")
        terminal.until("answered 503: busy")
        terminal.say("/exprt")
        terminal.until("did you mean /export?")
        terminal.say("/export")
        terminal.until("no turn of Kit Holt's")
        terminal.say("/as Kit Holt")
        terminal.until("/lead TEXT")
        terminal.say("/as Environment")
        terminal.until("Environment> ")
        terminal.say("/go")
        said = terminal.until("here.")
        assert "\ufffd[31m\ufffdred\ufffd2J\ufffd here." in said  # no escape sequence of a model's reaches the terminal
        terminal.say("/quit")
        assert terminal.end() == 0


def test_a_pipe_is_a_script(endpoint: StreamingEndpoint, tmp_path: Path) -> None:
    lines = "Good day.\n/export\n"
    done = subprocess.run(
        [sys.executable, "-m", "her_nemo", "chat", f"endpoint={endpoint.url}", "scene=0", "out=chat"],
        input=lines, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 samples in chat/samples.jsonl" in done.stdout.replace("\n", " ")
    rows, _ = read_rows(tmp_path / "chat" / "samples.jsonl", "sft")
    assert "drum 1" in rows[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "checkpoint or endpoint: neither is given"),
        (["endpoint=http://x/v1", "checkpoint=nowhere"], "both are given"),
        (["checkpoint=nowhere"], "nowhere: no such directory"),
        (["endpoint=localhost:8000"], "is no address of a server"),
        (["endpoint="], "'' is no address of a server"),
        (["endpoint=http://x/v1", "scenes=none.jsonl"], "none.jsonl: no such file"),
        (["endpoint=http://x/v1", "partner.model=m"], "partner.model: has no effect without partner.endpoint"),
        (["endpoint=http://x/v1", "api_key_env=NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set"),
        (["endpoint=http://x/v1", "web=true", "host=0.0.0.0"], "names no machine"),
        (["endpoint=http://x/v1", "scene=99"], "scene=99: there are 24, 0 to 23"),
        (["endpoint=http://x/v1", "scene=0", "character=Hamlet"], "the model can play Kit Holt"),
        (["endpoint=http://x/v1", "scene=0", "turns=7"], "turns=7: the scene has 1"),
        (["endpoint=http://127.0.0.1:9/v1", "scene=0"], "is the server up?"),
        (["endpoint=http://x/v1", "tempreture=1"], "did you mean sampling.temperature?"),
        (["endpoint=http://x/v1", "--webb"], "no option '--webb'"),
    ],
)
def test_errors_before_anything_starts(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
