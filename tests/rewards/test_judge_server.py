"""A judge behind real sockets: what is sent, what comes back, and servers that fail in every way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from judges import candidates_of, longer, replies, verdict_text
from scripted_endpoint import Reply, Script, ScriptedEndpoint

from her_nemo.config.errors import UserError
from her_nemo.config.rl import JudgeSource
from her_nemo.rewards import judge_server
from her_nemo.rewards.generative import GenerativeReward
from her_nemo.rewards.judge import Pair, Verdicts
from her_nemo.rewards.judge_server import ServerJudge
from her_nemo.rewards.reward import Mix, begin_scoring
from her_nemo.roleplay.judging import judge_messages
from her_nemo.roleplay.verdict import VERDICT_SCHEMA

pytestmark = pytest.mark.usefixtures("world")
PAIRS = [Pair("A scene.", f"Mara: {'word ' * count}".strip(), "Mara: word word word") for count in (1, 2, 3, 4, 5, 6)]
POINTS = [-1, -1, 0, 1, 1, 1]
QUESTIONS = [judge_messages("A scene.", f"Mara: {number}", "Mara: no") for number in range(8)]


def judged(body: dict, number: int) -> Reply:
    return Reply(verdict_text(longer(*candidates_of(body["messages"]))))


def echo(body: dict, number: int) -> Reply:
    return Reply(candidates_of(body["messages"])[0])


@pytest.fixture
def judge_at(monkeypatch: pytest.MonkeyPatch):
    """Servers by their scripts, and the judge over them."""
    monkeypatch.setattr(judge_server, "BACKOFF_SECONDS", 0.01)
    with ExitStack() as closing:

        def start(*scripts: Script, roots: tuple[str, ...] = (), **keys: object):
            listed = [[{"id": "grm", "root": root}] for root in roots] or [None] * len(scripts)
            servers = [
                closing.enter_context(ScriptedEndpoint(script, models=models))
                for script, models in zip(scripts, listed, strict=True)
            ]
            given = {"servers": [server.url for server in servers], "model": "grm"} | keys
            return servers, ServerJudge(JudgeSource(**given))

        yield start


def failing(status: int) -> Script:
    return lambda body, number: Reply(status=status)


def test_verdicts_of_a_server_in_both_orders(judge_at: Callable) -> None:
    (server,), judge = judge_at(judged, temperature=0.0, max_tokens=77)
    verdicts = Verdicts(judge)
    assert [said.points for said in verdicts.compare(PAIRS)] == POINTS
    assert (verdicts.asked, len(server.requests)) == (10, 10), "the third pair looks the same"
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("grm", 0.0, 77)
    assert body["response_format"]["json_schema"]["schema"] == VERDICT_SCHEMA
    assert [said.points for said in verdicts.compare(PAIRS)] == POINTS
    assert len(server.requests) == 10


def test_without_structured_output_and_with_a_key(judge_at: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    (server,), judge = judge_at(echo, structured_output=False, api_key_env="JUDGE_KEY")
    assert [answer.text for answer in judge.ask(QUESTIONS)] == [f"Mara: {number}" for number in range(8)]
    assert "response_format" not in server.requests[0]
    assert {key.lower(): value for key, value in server.headers[0].items()}["authorization"] == "Bearer sesame"


class Crowd:
    """A script whose first requests wait until so many are here together; counts who is here before it answers."""

    def __init__(self, parties: int) -> None:
        self.parties, self.gate, self.lock = parties, threading.Barrier(parties), threading.Lock()
        self.here = self.most = 0

    def __call__(self, body: dict, number: int) -> Reply:
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
        if number < self.parties:
            self.gate.wait(timeout=60)
        with self.lock:
            self.here -= 1
        return Reply(candidates_of(body["messages"])[0])


def test_all_questions_are_under_way_at_once_within_the_bound(judge_at: Callable) -> None:
    crowd = Crowd(8)
    _, judge = judge_at(crowd, concurrency=8)
    judge.ask(QUESTIONS)
    assert crowd.most == 8
    first, second = Crowd(2), Crowd(2)
    servers, judge = judge_at(first, second, concurrency=2)
    judge.ask(QUESTIONS)
    assert min(first.most, second.most) >= 2
    assert first.most + second.most <= 4
    assert sum(len(server.requests) for server in servers) == 8


def test_a_reward_that_began_is_judged_beside_other_work(judge_at: Callable) -> None:
    (server,), judge = judge_at(judged)
    others = [pair.other for pair in PAIRS]
    reward = GenerativeReward(Verdicts(judge), lambda seen: others, max_unparsed=0.0)
    seen = replies(*(pair.reply for pair in PAIRS))
    mixed = Mix({"generative": (2.0, reward)})
    begin_scoring(mixed, seen)
    deadline = time.monotonic() + 30
    while len(server.requests) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(server.requests) == 10, "nothing is asked before the reward is called"
    assert mixed(seen).scores_B.tolist() == [2.0 * points for points in POINTS]
    assert len(server.requests) == 10
    # Other replies than those that were begun are judged by themselves.
    others[:] = ["Mara: word word"] * 2
    begin_scoring(mixed, replies(PAIRS[0].reply, PAIRS[3].reply))
    del others[1:]
    assert mixed(replies("Mara: word word word word word word word")).scores_B.tolist() == [2.0]


@pytest.mark.parametrize(
    "bad",
    [failing(500), failing(503), failing(429), lambda body, number: Reply(hang_up=True),
     lambda body, number: Reply(raw=b"{}"), lambda body, number: Reply("late", delay=1.5)],
    ids=["500", "503", "429", "hang_up", "no_answer", "timeout"],
)  # fmt: skip
def test_another_server_takes_over(judge_at: Callable, bad: Script) -> None:
    (broken, well), judge = judge_at(bad, echo, timeout_seconds=0.5, concurrency=2)
    for _ in range(2):
        assert [answer.text for answer in judge.ask(QUESTIONS)] == [f"Mara: {number}" for number in range(8)]
    assert 1 <= len(broken.requests) <= 8
    assert len(well.requests) == 16


def test_a_server_that_failed_is_used_again_once_it_is_well(
    judge_at: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_server, "AVOIDED_SECONDS", 0.2)
    down = [True]
    (moody, _), judge = judge_at(
        lambda body, number: Reply(status=500) if down[0] else echo(body, number), echo, concurrency=2
    )
    judge.ask(QUESTIONS)
    down[0], before = False, len(moody.requests)
    time.sleep(1.0)
    judge.ask(QUESTIONS)
    assert len(moody.requests) - before >= 3


def test_what_a_server_refuses_has_no_verdict(judge_at: Callable) -> None:
    def refuse_three(body: dict, number: int) -> Reply:
        shown = candidates_of(body["messages"])[0]
        return Reply("too long", status=400) if shown == "Mara: 3" else echo(body, number)

    (server,), judge = judge_at(refuse_three)
    answers = judge.ask(QUESTIONS)
    assert [answer.text is None for answer in answers] == [number == 3 for number in range(8)]
    assert "HTTP 400: too long" in answers[3].problem
    assert len(server.requests) == 8, "asked again although it will never do"


def test_a_verdict_that_is_cut_off_says_so(judge_at: Callable) -> None:
    _, judge = judge_at(lambda body, number: Reply('{"principles": [', finish_reason="length"))
    (said,) = Verdicts(judge).compare(PAIRS[:1])
    assert said.points is None
    assert len(said.problems) == 2
    assert "cut off at reward.generative.judge.max_tokens" in said.problems[0]


def test_nobody_answers(judge_at: Callable) -> None:
    _, judge = judge_at(failing(500), failing(500), retries=2)
    with pytest.raises(UserError, match=r"none of 8 questions was answered: http://127.*HTTP 500"):
        judge.ask(QUESTIONS)


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_name_ends_it_at_once(judge_at: Callable, status: int) -> None:
    (server,), judge = judge_at(failing(status), concurrency=1)
    with pytest.raises(UserError, match=f"HTTP {status}"):
        judge.ask(QUESTIONS)
    assert len(server.requests) <= 2


def test_the_judge_s_identity(judge_at: Callable) -> None:
    (server,), judge = judge_at(echo)
    assert judge.identity["judge"] == {"model": "grm", "served": [server.url]}
    _, of_root = judge_at(echo, roots=("/models/grm",))
    _, same = judge_at(echo, echo, roots=("/models/grm", "/models/grm"))
    assert of_root.identity == same.identity
    assert of_root.identity["judge"] == {"model": "grm", "served": ["/models/grm"]}
    assert judge_at(echo, roots=("/models/grm",), max_tokens=5)[1].identity != of_root.identity
    with pytest.raises(UserError, match="at one and /models/new at another"):
        judge_at(echo, echo, roots=("/models/grm", "/models/new"))


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"reward\.generative\.judge\.servers: .*Is the server up"):
        ServerJudge(JudgeSource(servers=["http://127.0.0.1:9/v1"], model="grm"))
