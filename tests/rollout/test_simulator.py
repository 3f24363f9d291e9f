"""A model behind OpenAI-compatible servers as a simulator, over real sockets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data" / "synthesis"))

from scripted_endpoint import Reply, Script, ScriptedEndpoint

from her_nemo.config.errors import UserError
from her_nemo.config.rl import DialogueSimulator
from her_nemo.roleplay.dialogue import Conversation, read_start
from her_nemo.roleplay.prompt import RolePrompt, Utterance, build_messages
from her_nemo.rollout.simulator import Ask, ServedSimulator

ROLE = RolePrompt(name="Ada", book="Salt", profile="p", others=(("Bo", "A cousin."),), inner_thoughts="I hide gold.")


@pytest.fixture
def serve() -> Iterator[Callable[[Script], ScriptedEndpoint]]:
    running: list[ScriptedEndpoint] = []

    def start(script: Script) -> ScriptedEndpoint:
        running.append(ScriptedEndpoint(script).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def asks(count: int) -> list[Ask]:
    found = []
    for number in range(count):
        opening = [Utterance("Bo", f"Bo: Good day {number}.")]
        talk = Conversation(read_start(f"t{number}", build_messages(ROLE, "Ada", opening)))
        talk.say("<system_thinking>Ada waits.</system_thinking>Ada: <role_thinking>Gold.</role_thinking> Hm.")
        found.append(Ask(talk.start, 0, talk.partner_messages(), 100 + number))
    return found


def simulator(*urls: str, **keys: Any) -> ServedSimulator:
    values = {"kind": "openai", "servers": list(urls), "model": "m", "retries": 0, "timeout_seconds": 5.0, **keys}
    return ServedSimulator(DialogueSimulator(**values))


def echo(body: dict[str, Any], number: int) -> Reply:
    return Reply(text=f"Bo: I heard of {body['messages'][2]['content'].split()[-1]}")


def test_every_conversation_gets_its_own_answer(serve: Callable[[Script], ScriptedEndpoint]) -> None:
    server = serve(echo)
    beats: list[float] = []
    said = simulator(server.url, concurrency=3).answer(asks(8), lambda: beats.append(time.monotonic()))
    # Bo's own opening stands in his prompt after the head.
    assert said == [f"Bo: I heard of {number}." for number in range(8)]
    assert server.most_at_once <= 3
    assert beats
    assert sorted(body["seed"] for body in server.requests) == list(range(100, 108))
    for body in server.requests:
        assert (body["model"], body["stop"], body["max_tokens"]) == ("m", ["\nAda:"], 256)
        text = "\n".join(message["content"] for message in body["messages"])
        assert "Ada: Hm." in text
        assert "Gold." not in text
        assert "waits" not in text
        assert "hide gold" not in text


def test_when_a_server_dies_its_conversations_go_on_at_another(
    serve: Callable[[Script], ScriptedEndpoint], capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = serve(echo), serve(lambda body, number: Reply(hang_up=True) if number else echo(body, 0))
    played = simulator(bad.url, good.url)
    assert len(played.answer(asks(6), lambda: None)) == 6
    asked = len(bad.requests)
    assert f"simulator {bad.url} lost, 1 left" in capfd.readouterr().err
    assert len(played.answer(asks(6), lambda: None)) == 6
    assert len(bad.requests) == asked, "a lost server was asked again"


def test_with_no_server_left_there_is_one_clear_error(serve: Callable[[Script], ScriptedEndpoint]) -> None:
    server = serve(lambda body, number: Reply(status=503))
    with pytest.raises(UserError, match=r"no simulator is left: .*HTTP 503.*resumed from its last checkpoint"):
        simulator(server.url, retries=1).answer(asks(2), lambda: None)


def test_a_refused_conversation_is_named(serve: Callable[[Script], ScriptedEndpoint]) -> None:
    server = serve(lambda body, number: Reply(status=400, text="context is 512 tokens"))
    with pytest.raises(UserError, match="refused the conversation t0: HTTP 400: context is 512 tokens"):
        simulator(server.url).answer(asks(1), lambda: None)
    assert len(server.requests) == 1, "a request that is wrong was sent again"
