"""The benchmarks' client on real sockets: cache, failures as values, concurrency, who is told from whom."""

from __future__ import annotations

import asyncio
import json

import pytest
from scripted_endpoint import QUICK, Reply

from her_nemo.config.endpoints import RequestLimits
from her_nemo.config.errors import UserError
from her_nemo.config.evaluation import ChatModel, ChatSampling
from her_nemo.data.synthesis.endpoint import Completion
from her_nemo.evaluation.endpoint import (
    BadAnswer,
    RoleModel,
    fingerprint,
    json_object_in,
    open_models,
    run_all,
    usage_of,
)
from her_nemo.evaluation.results import Failure, FailureKind

ASK = [{"role": "user", "content": "Who goes there?"}]


def chat(server, **keys) -> ChatModel:
    return ChatModel(endpoint=server.url, **{"model": "scripted"} | keys)


def with_models(roles, tmp_path, work, **limits):
    """What `work(models)` returns."""

    async def run():
        async with open_models(roles, tmp_path / "cache", RequestLimits(**QUICK | limits)) as models:
            return await work(models)

    return asyncio.run(run())


def ask(server, tmp_path, draws=(0,), **keys):
    async def work(models):
        model: RoleModel = models["judge"]
        return [await model.complete(ASK, draw=draw) for draw in draws], model

    return with_models({"judge": chat(server, **keys)}, tmp_path, work)


def test_nothing_is_asked_twice(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(f"answer {number}"))
    first, model = ask(server, tmp_path)
    again, replayed = ask(server, tmp_path)
    assert first == again == [Completion("answer 0", "", "stop", 3, 2)]
    assert len(server.requests) == 1
    assert (model.asked.requests, model.replayed.requests) == (1, 0)
    assert (replayed.asked.requests, replayed.replayed.requests, replayed.replayed.completion_tokens) == (
        0,
        1,
        2,
    )
    assert usage_of({"judge": replayed})["judge"]["cached"]["prompt_tokens"] == 3


def test_model_role_sampling_and_draw_are_in_the_key(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(str(number)))

    async def both(models):
        return [(await model.complete(ASK)).text for model in models.values()]

    roles = {"judge": chat(server), "actor": chat(server)}
    assert with_models(roles, tmp_path, both) == ["0", "1"]
    assert [done.text for done in ask(server, tmp_path, draws=(0, 1, 0))[0]] == ["0", "2", "0"]
    assert ask(server, tmp_path, sampling=ChatSampling(temperature=0.5))[0][0].text == "3"
    assert ask(server, tmp_path, revision="b")[0][0].text == "4"
    assert ask(server, tmp_path, model="other")[0][0].text == "5"
    assert ask(server, tmp_path)[0][0].text == "0"


def test_the_seed_goes_with_the_draw(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply("fine"))
    ask(server, tmp_path, draws=(0, 2), sampling=ChatSampling(seed=40, top_p=0.9, max_tokens=7))
    assert [request["seed"] for request in server.requests] == [40, 42]
    assert server.requests[0] | {"seed": 0} == {
        "model": "scripted", "messages": ASK, "temperature": 0.0, "top_p": 0.9, "max_tokens": 7, "seed": 0,
    }  # fmt: skip


def test_the_same_question_at_once_is_asked_once(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(str(number), delay=0.1))

    async def twice(models):
        return await asyncio.gather(*(models["judge"].complete(ASK) for _ in range(3)))

    assert {done.text for done in with_models({"judge": chat(server)}, tmp_path, twice)} == {"0"}
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (Reply(refusal="I will not judge this"), FailureKind.REFUSED, "will not judge"),
        (Reply("cut", finish_reason="content_filter"), FailureKind.REFUSED, "filter"),
        (Reply("late", delay=2.0), FailureKind.TIMED_OUT, "no answer in 0.2 s"),
        (Reply(status=400, text="too long"), FailureKind.ENDPOINT, "too long"),
    ],
)
def test_a_failed_call_is_a_value(serve, tmp_path, reply, kind, said) -> None:
    server = serve(lambda request, number: reply)

    async def work(models):
        return await models["judge"].complete(ASK)

    failure = with_models({"judge": chat(server)}, tmp_path, work, timeout_seconds=0.2, retries=0)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.role) == (kind, "judge")
    assert said in failure.message


def test_an_endpoint_failure_is_asked_again_by_the_next_run(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(status=400) if number == 0 else Reply("better"))
    assert isinstance(ask(server, tmp_path)[0][0], Failure)
    assert ask(server, tmp_path)[0][0].text == "better"


def number_in(text: str) -> int:
    body = json_object_in(text)
    if not isinstance(body.get("n"), int):
        raise BadAnswer("no whole number n")
    return body["n"]


def parsed(server, tmp_path, attempts, **limits):
    async def work(models):
        return await models["judge"].parsed(
            ASK, number_in, attempts=attempts, schema=("n", {"type": "object"})
        )

    return with_models({"judge": chat(server, sampling=ChatSampling(seed=5))}, tmp_path, work, **limits)


def test_a_bad_answer_is_asked_again(serve, tmp_path) -> None:
    texts = ["no json", '{"n": "x"}', 'Thinking {a}. ```json\n{"n": 7}\n```']
    server = serve(lambda request, number: Reply(texts[number]))
    assert parsed(server, tmp_path, 3) == (7, texts[2])
    assert [request["seed"] for request in server.requests] == [5, 6, 7]
    assert [request["temperature"] for request in server.requests] == [0.0, 1.0, 1.0]
    assert server.requests[0]["response_format"]["json_schema"]["name"] == "n"
    assert parsed(server, tmp_path, 3) == (7, texts[2])
    assert len(server.requests) == 3, "bad answers are cached too"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply("I think it was rather good."), FailureKind.UNPARSABLE),
        (Reply("I'm sorry, but I can't rate this."), FailureKind.REFUSED),
        (Reply("抱歉，我无法评价。"), FailureKind.REFUSED),
        (Reply('{"n": ', finish_reason="length"), FailureKind.TRUNCATED),
    ],
)
def test_a_judge_that_fails_gives_a_failure(serve, tmp_path, reply, kind) -> None:
    server = serve(lambda request, number: reply)
    failure = parsed(server, tmp_path, 2)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.answer) == (kind, reply.text)
    assert len(server.requests) == 2


def test_the_only_model_listed_is_taken(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply("fine"), models=[{"id": "served"}])
    _, model = ask(server, tmp_path, model=None)
    assert server.requests[0]["model"] == model.model == "served"
    two = serve(lambda request, number: Reply("fine"), models=[{"id": "a"}, {"id": "b"}])
    with pytest.raises(UserError, match=r"judge\.model: .* lists a, b"):
        ask(two, tmp_path, model=None)


def test_a_checkpoint_that_changed_is_another_model(serve, tmp_path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(b"first")
    server = serve(lambda request, number: Reply(str(number)), models=[{"id": "scripted", "root": str(root)}])
    _, model = ask(server, tmp_path)
    assert model.identity == {"model": "scripted", "root": str(root), "fingerprint": fingerprint(root)}
    before = fingerprint(root)
    (root / "notes.md").write_text("not what shapes answers")
    assert fingerprint(root) == before
    (root / "model.safetensors").write_bytes(b"other")
    assert fingerprint(root) != before
    assert ask(server, tmp_path)[0][0].text == "1"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.safetensors", "model.gguf", "config.json"])
def test_a_changed_file_is_another_model(tmp_path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    before = fingerprint(tmp_path)
    (tmp_path / name).write_bytes(b"{} ")
    assert fingerprint(tmp_path) != before


def test_large_files_count_by_their_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("her_nemo.evaluation.endpoint._WHOLE_FILE", 16)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 * 2**20))
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint(tmp_path) != before


def test_units_run_side_by_side_and_come_back_in_order(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(request["messages"][0]["content"], delay=0.05))

    async def work(models):
        async def one(unit: int) -> str:
            done = await models["judge"].complete([{"role": "user", "content": str(unit)}])
            return done.text

        return await run_all(range(12), one, concurrency=6, title="test", models=list(models.values()))

    assert with_models({"judge": chat(server)}, tmp_path, work, concurrency=3) == [str(i) for i in range(12)]
    assert server.most_at_once == 3, "the endpoint's limit holds whatever the units"


def test_a_log_gets_a_line_now_and_then(serve, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("her_nemo.evaluation.endpoint.LINE_SECONDS", 0.0)
    server = serve(lambda request, number: Reply("fine"))

    async def work(models):
        async def one(unit: int):
            return await models["judge"].complete(ASK, draw=unit)

        return await run_all(range(3), one, concurrency=1, title="coser", models=list(models.values()))

    with_models({"judge": chat(server)}, tmp_path, work)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("coser: ")]
    assert [line.split(",")[0] for line in lines] == [f"coser: {done} of 3 scenes" for done in (1, 2, 3)]
    assert "about 0 minutes left, 12 tokens, 0 answers from the cache" in lines[-1]


def test_an_error_stops_all(serve, tmp_path) -> None:
    server = serve(lambda request, number: Reply(status=401))

    async def work(models):
        return await run_all(range(50), lambda _: models["judge"].complete(ASK), concurrency=2, title="test")

    with pytest.raises(UserError, match="api_key_env"):
        with_models({"judge": chat(server)}, tmp_path, work)
    assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Here:\n```json\n{"a": {"b": 2}}\n```\nDone.', {"a": {"b": 2}}),
        ('First {"a": 1}, no: {"a": {"b": 3}}.', {"a": {"b": 3}}),
        ('{"a": 1} is what I say.', {"a": 1}),
        ('{"a": "line\nbreak"}', {"a": "line\nbreak"}),
    ],
)
def test_the_object_in_an_answer(text, found) -> None:
    assert json_object_in(text) == found
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('Rule 6 says {"flaws": []} where nothing is wrong. Turn 1 is garbled, and', "both sides"),
        ('A draft: {"flaws": []}. My answer: {"flaws": [{"kind": "garbled_text", "turns": [1', "broken"),
        ('{"flaws": []} no, {flaws: [{"kind": "stagnation"}]}', "broken"),
        ('```json\n{"flaws": []}\n```\nbut then {"flaws": [{"kind"', "broken"),
        ('{"Worlds": {"flaws": []}', "no JSON object"),
        ('{broken {"a": 1}', "no JSON object"),
    ],
)
def test_a_draft_is_no_answer(text: str, problem: str) -> None:
    with pytest.raises(BadAnswer, match=problem):
        json_object_in(text)


def test_an_answer_without_an_end_is_none(serve, tmp_path) -> None:
    """Cut off at max_tokens: a number could be read in it, but what was to come is not known."""
    server = serve(lambda request, number: Reply('It is {"n": 1}', finish_reason="length"))

    async def work(models):
        return [await models["judge"].parsed(ASK, number_in, whole=whole) for whole in (True, False)]

    cut, read = with_models({"judge": chat(server)}, tmp_path, work)
    assert isinstance(cut, Failure)
    assert cut.kind is FailureKind.TRUNCATED
    assert read[0] == 1


@pytest.mark.parametrize("text", ["", "no", "[1, 2]", '{"a": ', "```json\n[]\n```"])
def test_no_object_in_an_answer(text) -> None:
    with pytest.raises(BadAnswer, match="no JSON object"):
        json_object_in(text)
