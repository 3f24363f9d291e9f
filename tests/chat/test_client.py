"""The wire: streamed replies over real sockets, and what is said when they do not come."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import httpx
import pytest
from streaming_endpoint import GOOD, Reply, StreamingEndpoint

from her_nemo.chat.client import ChatClient, Piece, PromptTooLong, events, is_loopback
from her_nemo.chat.players import Players, Progress
from her_nemo.chat.session import ChatSession
from her_nemo.config.chat import ReplySampling
from her_nemo.config.errors import UserError

PROMPT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def asked(url: str, number: int = 0, *, model: str | None = "tiny", timeout: float = 30, **sampling) -> list[Piece]:
    """Every piece of one reply."""

    async def run() -> list[Piece]:
        async with ChatClient(url, model, ReplySampling(**sampling), timeout) as client:
            await client.find_model("model")
            return [Piece(piece.text, piece.finish_reason) async for piece in client.stream(PROMPT, number)]

    return asyncio.run(run())


def test_a_reply_comes_in_pieces_that_grow() -> None:
    with StreamingEndpoint(Reply(GOOD, size=5)) as server:
        pieces = asked(server.url, temperature=0.5, top_p=0.9, max_tokens=33)
        assert len(pieces) == -(-len(GOOD) // 5) + 1
        assert all(GOOD.startswith(piece.text) for piece in pieces)
        assert pieces[-1] == Piece(GOOD, "stop")
        assert server.requests == [
            {"model": "tiny", "messages": PROMPT, "stream": True, "temperature": 0.5, "top_p": 0.9, "max_tokens": 33}
        ]


def test_what_is_sent_only_where_it_is_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")

    async def run(url: str) -> None:
        async with ChatClient(url, "tiny", ReplySampling(top_k=7, seed=10), 10, "SOME_KEY") as client:
            async for _ in client.stream(PROMPT, 3):
                pass

    with StreamingEndpoint() as server:
        asyncio.run(run(server.url))
        assert (server.requests[0]["top_k"], server.requests[0]["seed"]) == (7, 13)
        assert server.headers[0]["authorization"] == "Bearer secret"
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        ChatClient("http://localhost/v1", None, ReplySampling(), 1, "NO_SUCH_KEY")


def test_line_separators_inside_a_text_end_no_event() -> None:
    text = "Kit: one\u2028two\u0085three\x0bfour 中文 …"
    with StreamingEndpoint(Reply(text, size=1)) as server:
        assert asked(server.url)[-1].text == text


@pytest.mark.parametrize("cut", range(1, 12))
def test_events_wherever_the_chunks_are_cut(cut: int) -> None:
    raw = 'data: {"a": "中\u2028"}\r\n\r\n: a comment\ndata:second\n\ndata: [DONE]\n\ndata: not read\n'.encode()

    async def chunks():
        for start in range(0, len(raw), cut):
            yield raw[start : start + cut]

    async def run() -> list[str]:
        return [event async for event in events(chunks())]

    assert asyncio.run(run()) == ['{"a": "中\u2028"}', "second"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("who are you", status=401), "answered 401: who are you; set api_key_env"),
        (Reply("no such model", status=404), "the address ends in /v1"),
        (Reply("overloaded", status=503), "answered 503: overloaded"),
        (Reply(finish=None), "broke off in the middle"),
        (Reply(broken=b'data: {"error": {"message": "out of memory"}}\n\n'), "stopped: out of memory"),
        (Reply(broken=b"data: <html>\n\n"), "not an OpenAI answer"),
        (Reply(broken=b'data: {"x": 1}\n\n'), "not an OpenAI answer"),
    ],
)
def test_what_goes_wrong_is_said(reply: Reply, said: str) -> None:
    with StreamingEndpoint(reply) as server, pytest.raises(UserError, match=said):
        asked(server.url)


def test_a_server_that_goes_silent() -> None:
    with StreamingEndpoint(Reply(seconds=60)) as server, pytest.raises(UserError, match="no answer in 2 s"):
        asked(server.url, timeout=2)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match="is the server up"):
        asked("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("models", "said"), [((), "0 models"), (("a", "b"), r"2 models \(a, b\): name one with model=")]
)
def test_the_models_name_is_found_where_there_is_one(models: tuple[str, ...], said: str) -> None:
    with StreamingEndpoint(models=("only",)) as server:
        asked(server.url, model=None)
        assert server.requests[0]["model"] == "only"
    with StreamingEndpoint(models=models) as server, pytest.raises(UserError, match=said):
        asked(server.url, model=None)


def test_only_this_machines_own_addresses_are_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]")))
    assert not any(map(is_loopback, ("10.0.0.1", "localhost.evil.org", "0.0.0.0", "example.org")))


# ---------------------------------------------------------------- players


def long_session(session: ChatSession, exchanges: int) -> ChatSession:
    for number in range(exchanges):
        session.add("Kit Holt", f"Kit Holt: reply {number}")
        session.say("Pia Penn", f"line {number}")
    return session


def played(url: str, session: ChatSession, partner: str | None = None, speaker: str = "Kit Holt") -> list[Progress]:
    async def run() -> list[Progress]:
        async with (
            ChatClient(url, "tiny", ReplySampling(), 30) as one,
            ChatClient(partner or url, "p", ReplySampling(), 30) as two,
        ):
            pieces = Players(one, two if partner else one).play(session, speaker)
            return [Progress(each.text, each.finished, each.dropped) async for each in pieces]

    return asyncio.run(run())


def test_a_prompt_that_does_not_fit_loses_its_oldest_turns(session: ChatSession) -> None:
    def script(request, number) -> Reply:
        if len(request["messages"]) > 6:
            return Reply("This model's maximum context length is 64 tokens.", status=400)
        return Reply()

    long_session(session, 20)
    with StreamingEndpoint(script) as server:
        pieces = played(server.url, session)
    # 21 exchanges in steps of 2: 18 dropped is the first try with 6 messages or fewer.
    assert (pieces[-1].finished, pieces[-1].dropped) == (True, 18)
    told = server.requests[-1]["messages"]
    assert told[0]["role"] == "system"
    assert told[1]["content"] == "===Conversation Start===\n\nPia Penn: line 17"
    assert told[-1]["content"] == "Pia Penn: line 19"
    assert len(server.requests) == 10


def test_a_prompt_that_never_fits_says_so(session: ChatSession) -> None:
    with StreamingEndpoint(Reply("maximum context length is 1", status=400)) as server:
        with pytest.raises(PromptTooLong, match="maximum context length"):
            played(server.url, session)
        assert len(server.requests) == 1


def test_a_reply_cut_at_max_tokens_is_not_finished(session: ChatSession) -> None:
    with StreamingEndpoint(Reply("Kit Holt: I w", finish="length")) as server:
        pieces = played(server.url, session)
    assert [piece.finished for piece in pieces] == [None, None, False]


def test_the_partner_is_another_server_and_is_told_no_thought(session: ChatSession) -> None:
    session.own_partner = False
    session.add("Kit Holt", GOOD)
    with StreamingEndpoint() as lead, StreamingEndpoint(Reply("Pia Penn: Truly?")) as partner:
        assert played(lead.url, session, partner.url, "Pia Penn")[-1].text == "Pia Penn: Truly?"
        assert lead.requests == []
        told = partner.requests[0]["messages"]
    assert "never speak or act for Kit Holt" in told[0]["content"]
    assert told[-1]["content"] == "Kit Holt: <role_action>nods</role_action> Listen, the drum is mine."
    assert "mask" not in "".join(message["content"] for message in told)


def test_leaving_a_reply_hangs_up(session: ChatSession) -> None:
    async def run(url: str) -> None:
        async with (
            ChatClient(url, "tiny", ReplySampling(), 30) as client,
            aclosing(Players(client, client).play(session, "Kit Holt")) as pieces,
        ):
            async for _ in pieces:
                break

    with StreamingEndpoint(Reply(GOOD * 40, seconds=0.01)) as server:
        asyncio.run(run(server.url))
        assert server.hung_up.wait(30)


def test_a_server_of_this_machine_is_not_asked_through_a_proxy(monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with StreamingEndpoint() as server:
        assert asked(server.url)[-1].text == GOOD
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/models")
