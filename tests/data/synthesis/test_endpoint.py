"""The wire: retries, backoff, time-outs, rate limits, concurrency, and errors that end a run at once."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from scripted_endpoint import QUICK, Reply

from her_nemo.config.errors import UserError
from her_nemo.config.synthesis import Limits
from her_nemo.data.synthesis.endpoint import Completion, Endpoint, EndpointFailure

REQUEST = {"model": "scripted", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 8}


def call(server, count: int = 1, request=REQUEST, **limits):
    """(results or exceptions, endpoint) of `count` completions at once."""

    async def run():
        async with Endpoint(
            server if isinstance(server, str) else server.url, Limits(**QUICK | limits)
        ) as endpoint:
            work = (endpoint.complete(request) for _ in range(count))
            return await asyncio.gather(*work, return_exceptions=True), endpoint

    return asyncio.run(run())


def faulty(*faults: Reply):
    """A script that plays the faults first and answers from then on."""
    return lambda request, number: faults[number] if number < len(faults) else Reply("fine")


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=500),
        Reply(status=503, raw=b"<html>busy</html>"),
        Reply(status=429, headers={"retry-after": "0"}),
        Reply(status=408),
        Reply(hang_up=True),
        Reply(raw=b"not json at all"),
        Reply(raw=b'{"choices": []}'),
        Reply(raw=b'{"object": "error"}'),
        Reply(raw=b'{"choices": [{"message": {"content": 7}}]}'),
    ],
    ids=["500", "503-html", "429", "408", "hang-up", "not-json", "no-choice", "not-openai", "not-text"],
)
def test_a_fault_is_retried(serve, fault) -> None:
    server = serve(faulty(fault, fault))
    (done,), endpoint = call(server)
    assert done == Completion("fine", "", "stop", 2, 1)
    assert len(server.requests) == 3
    assert endpoint.retries == 2


def test_a_timeout_is_retried(serve) -> None:
    server = serve(faulty(Reply("late", delay=1.0)))
    (done,), _ = call(server, timeout_seconds=0.2)
    assert done.text == "fine"
    assert len(server.requests) == 2


def test_retry_after_is_waited_for_by_every_request(serve) -> None:
    server = serve(faulty(Reply(status=429, headers={"retry-after": "0.6"})))
    begin = time.monotonic()
    results, _ = call(server, count=3, concurrency=1)
    assert [done.text for done in results] == ["fine"] * 3
    assert min(server.times[1:]) - server.times[0] >= 0.55
    assert time.monotonic() - begin < 5


def test_backoff_grows(serve) -> None:
    server = serve(faulty(*[Reply(status=500)] * 3))
    call(server, backoff_seconds=0.2)
    gaps = [later - earlier for earlier, later in zip(server.times, server.times[1:], strict=False)]
    # Jitter takes up to half of 0.2, 0.4, 0.8 away.
    assert [gap >= least for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True)] == [True] * 3


def test_retries_are_spent(serve) -> None:
    server = serve(lambda request, number: Reply(status=502, text="bad gateway"))
    (failure,), _ = call(server, retries=2)
    assert isinstance(failure, EndpointFailure)
    assert failure.kind == "http_502"
    assert "bad gateway" in str(failure)
    assert len(server.requests) == 3


def test_a_bad_request_is_not_retried(serve) -> None:
    server = serve(lambda request, number: Reply(status=400, text="context length is 2048"))
    (failure,), _ = call(server)
    assert isinstance(failure, EndpointFailure)
    assert failure.kind == "http_400"
    assert "context length is 2048" in str(failure)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "word"), [(401, "api_key_env"), (403, "refuses"), (404, "/v1")])
def test_a_wrong_key_or_path_ends_the_run(serve, status, word) -> None:
    server = serve(lambda request, number: Reply(status=status, text="no"))
    (failure,), _ = call(server)
    assert isinstance(failure, UserError)
    assert word in str(failure)
    assert len(server.requests) == 1


def test_a_dead_endpoint_ends_the_run() -> None:
    results, _ = call("http://127.0.0.1:9/v1", count=3, retries=1, give_up_after=3)
    assert sorted(type(failure).__name__ for failure in results) == ["EndpointFailure"] * 2 + ["UserError"]
    assert "Is the server up?" in str(next(failure for failure in results if isinstance(failure, UserError)))


def test_failures_are_counted_in_a_row_only(serve) -> None:
    server = serve(lambda request, number: Reply("fine") if number % 2 else Reply(status=500))
    results, _ = call(server, count=8, concurrency=1, retries=0, give_up_after=2)
    assert sum(isinstance(done, EndpointFailure) for done in results) == 4


def test_no_more_than_so_many_at_once(serve) -> None:
    server = serve(lambda request, number: Reply("fine", delay=0.05))
    results, _ = call(server, count=12, concurrency=3)
    assert {done.text for done in results} == {"fine"}
    assert server.most_at_once == 3


def test_requests_per_minute(serve) -> None:
    server = serve(lambda request, number: Reply("fine"))
    call(server, count=5, requests_per_minute=600.0)
    assert server.times[-1] - server.times[0] >= 0.25  # 0.1 s apart, less the first one's way there


def test_tokens_per_minute_counts_what_was_used(serve) -> None:
    # Estimated at 8 + 11 / 4 tokens each, which would be 2.15 s in all; 3 are used, which is 0.6 s.
    server = serve(lambda request, number: Reply("fine"))
    call(server, count=5, concurrency=1, tokens_per_minute=1200.0)
    assert 0.3 <= server.times[-1] - server.times[0] <= 1.9


def test_reasoning_in_its_own_field_or_in_the_text(serve) -> None:
    server = serve(
        lambda request, number: [Reply("said", reasoning="thought"), Reply("<think>thought</think>\n\nsaid")][
            number
        ]
    )
    for _ in range(2):

        async def one():
            async with Endpoint(server.url, Limits(**QUICK)) as endpoint:
                return await endpoint.complete(REQUEST)

        done = asyncio.run(one())
        assert (done.reasoning, done.text.strip()) == ("thought", "said")


def test_the_key_is_sent_and_never_shown(serve, monkeypatch) -> None:
    server = serve(lambda request, number: Reply(status=500))
    monkeypatch.setenv("OUR_KEY", "sesame")

    async def run():
        async with Endpoint(server.url, Limits(**QUICK | {"retries": 0}), "OUR_KEY") as endpoint:
            await endpoint.complete(REQUEST)

    with pytest.raises(EndpointFailure) as failure:
        asyncio.run(run())
    assert server.headers[0]["Authorization"] == "Bearer sesame"
    assert "sesame" not in str(failure.value)
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(UserError, match="OUR_KEY"):
        Endpoint(server.url, Limits(), "OUR_KEY")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", ""])
def test_an_address_that_is_none(url) -> None:
    with pytest.raises(UserError, match="endpoint="):
        Endpoint(url, Limits())


def test_models_of_one_name_are_told_apart(serve) -> None:
    def identity(server, model="served"):
        async def run():
            async with Endpoint(server.url, Limits(**QUICK)) as endpoint:
                return await endpoint.identity(model)

        return asyncio.run(run())

    def answer(request, number):
        return Reply("fine")

    local = [serve(answer, models=[{"id": "served", "root": root}]) for root in ("/models/a", "/models/b")]
    assert identity(local[0]) == {"model": "served", "root": "/models/a"}
    assert identity(local[0]) != identity(local[1])
    unlisted = serve(answer)
    assert identity(unlisted) == {"model": "served", "endpoint": unlisted.url}
    assert identity(local[0], "other") == {"model": "other", "endpoint": local[0].url}


def test_what_goes_over_the_wire_is_what_was_asked(serve) -> None:
    server = serve(lambda request, number: Reply("fine"))
    call(server, request=REQUEST | {"temperature": 0.5})
    assert json.loads(json.dumps(REQUEST | {"temperature": 0.5})) == server.requests[0]
