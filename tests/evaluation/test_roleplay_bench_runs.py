"""Whole runs of Role-Play Bench against a scripted endpoint on a real socket: by hand, failing, killed, typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from roleplay_bench_script import (
    PLAN,
    SEED,
    THOUGHT,
    ZH,
    answer,
    chunk_of,
    named,
    role_of,
    scripted,
    write_seeds,
)
from scripted_endpoint import QUICK, Reply

from her_nemo.config.evaluation import ChatModel, ChatSampling, JudgeModel
from her_nemo.config.roleplay_bench import CompareConfig, RoleplayBenchConfig
from her_nemo.evaluation.results import FailureKind, read_results, write_results
from her_nemo.evaluation.roleplay_bench import run_bench
from her_nemo.evaluation.roleplay_bench_score import (
    Category,
)
from her_nemo.planning.roleplay_bench_checks import comparison
from her_nemo.stages import evaluate_roleplay_bench

ROOT = Path(__file__).resolve().parents[2]


def config(server, tmp_path: Path, **keys) -> RoleplayBenchConfig:
    chat = {"endpoint": server.url, "model": "scripted", "sampling": ChatSampling(seed=0)}
    seeds = write_seeds(tmp_path / "seeds.jsonl", SEED, ZH)
    return RoleplayBenchConfig.model_validate(
        {
            "name": "test",
            "out": str(tmp_path / "out"),
            "seeds": seeds,
            "actor": ChatModel(**chat),
            "user": ChatModel(**chat),
            "judge": JudgeModel(**chat, attempts=2),
            "turns": 8,
            "chunk_turns": 4,
            "context_turns": 2,
            "runs": 2,
            "limits": QUICK,
        }
        | keys
    )


def test_a_run_by_hand(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    cfg = config(server, tmp_path)
    results, scenes = run_bench(cfg)
    assert [(scene.scene_id, scene.run) for scene in scenes] == [
        ("en/1", 0), ("en/1", 1), ("zh/1", 0), ("zh/1", 1),
    ]  # fmt: skip
    # Four sessions: four turns of the actor, four of the simulator, two chunks in three categories.
    assert Counter(map(role_of, server.requests)) == Counter(
        actor=16, user=16, worlds=8, stories=8, preferences=8
    )
    scene = scenes[0]
    assert [line.source for line in scene.dialogue] == ["given"] * 2 + ["actor", "user"] * 4
    assert scene.scores["overall"] == pytest.approx(81.25)
    assert scene.scores["overall_en"] == pytest.approx(81.25)
    assert "overall_zh" not in scene.scores
    assert scene.scores["flaw_contradiction"] == 0.5
    assert scene.scores["flaw_over_refusal"] == 0.0
    assert scene.scores["format_valid"] == 1.0
    assert scene.scores["self_bleu"] == pytest.approx(1.0)
    assert (scene.info["flaws"], scene.info["quotes_not_found"]) == (5, 1)
    by_name = {metric.name: metric for metric in results.metrics}
    assert by_name["overall"].interval.mean == pytest.approx(81.25)
    assert by_name["worlds"].interval.mean == pytest.approx(80)
    assert by_name["overall_zh"].interval.scenes == 1
    assert by_name["overall"].run_means == pytest.approx((81.25, 81.25))
    assert (results.judgements, results.judgements_failed, results.simulations_failed) == (24, 0, 0)
    assert results.valid
    assert results.settings["prompts"]["worlds_en"].startswith("roleplay_bench_worlds_en.v1@")
    assert "20 flaws named" in results.notes[-1]
    first = scene.judgements[0]
    assert (first.dimension, first.part) == ("worlds", "turns 3-6")
    assert first.score == pytest.approx((100 + 30 + 50) / 3)
    assert first.flaws[2].instance == "turn 5: “not said” (not found there): no"
    write_results(Path(cfg.out), results, scenes)
    again, read = read_results(cfg.out)
    assert (again, read[0].scores) == (results, dict(scene.scores))


def test_nobody_but_the_actor_was_shown_a_thought(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    run_bench(config(server, tmp_path, runs=1))
    for request in server.requests:
        whole = json.dumps(request["messages"], ensure_ascii=False)
        assert PLAN not in whole
        if role_of(request) != "actor":
            assert THOUGHT not in whole
    last = [request for request in server.requests if role_of(request) == "actor"][-1]
    assert THOUGHT in json.dumps(last["messages"])


def test_runs_have_draws_of_their_own(serve, tmp_path: Path) -> None:
    server = serve(scripted)
    run_bench(config(server, tmp_path, turns=1, seeds=write_seeds(tmp_path / "one.jsonl", SEED), runs=3))
    assert Counter(map(role_of, server.requests))["actor"] == 3


def test_failed_judgements_are_counted_and_make_no_score(serve, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        if role_of(request) == "stories" and chunk_of(request) == 7:
            return Reply("I'm sorry, but I can't rate this.")
        if role_of(request) == "preferences":
            return Reply("rather good")
        return scripted(request, number)

    server = serve(script)
    results, scenes = run_bench(config(server, tmp_path, runs=1))
    assert results.failures == {"judge": {"refused": 2, "unparsable": 4}}
    assert (results.judgements, results.judgements_failed) == (12, 6)
    assert not results.valid
    assert "stories" not in scenes[0].scores, "one of its chunks was not judged"
    assert "preferences" not in scenes[0].scores
    assert "worlds" in scenes[0].scores
    assert "overall" not in scenes[0].scores
    by_name = {metric.name: metric for metric in results.metrics}
    assert (by_name["overall"].interval, by_name["overall"].missing) == (None, 2)


def test_a_session_that_breaks_off_is_not_judged(serve, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        role = role_of(request)
        if role == "user" and "沈砚" in request["messages"][0]["content"]:
            return Reply("<role_thinking>hm</role_thinking>")  # nothing to see or hear, each time it is asked
        if role == "actor" and len(request["messages"]) > 6 and "Mara" in request["messages"][0]["content"]:
            return Reply(status=400, text="maximum context length exceeded")
        return scripted(request, number)

    server = serve(script)
    results, scenes = run_bench(config(server, tmp_path, runs=1))
    assert [scene.failures[0].kind for scene in scenes] == [FailureKind.ENDPOINT, FailureKind.UNPARSABLE]
    assert [scene.failures[0].role for scene in scenes] == ["actor", "user"]
    assert [len(scene.dialogue) for scene in scenes] == [6, 3]
    assert results.simulations_failed == 2
    assert not results.valid
    assert not any(role_of(request) in list(Category) for request in server.requests)


PROGRAM = """
import json, sys
from her_nemo.config.roleplay_bench import RoleplayBenchConfig
from her_nemo.evaluation.roleplay_bench import run_bench
run_bench(RoleplayBenchConfig.model_validate_json(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(serve, tmp_path: Path) -> None:
    answered: list[str] = []
    stuck = True

    def script(request: dict, number: int) -> Reply:
        if stuck and number >= 25:
            return Reply(delay=30.0, hang_up=True)
        answered.append(json.dumps(request, sort_keys=True))
        return scripted(request, number)

    server = serve(script)
    cfg = config(server, tmp_path, limits=QUICK | {"timeout_seconds": 60.0})
    done = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, cfg.model_dump_json()], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    cached = tmp_path / "out" / "cache"
    deadline = time.monotonic() + 90
    # Killed when every answer that was given is on disk and the next ones are being waited for.
    while len(list(cached.glob("*/*.json"))) < 25 or len(server.requests) < 28:
        assert time.monotonic() < deadline, len(server.requests)
        assert done.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    done.send_signal(signal.SIGKILL)
    done.wait()
    stuck = False
    first = len(answered)
    results, _ = run_bench(cfg)
    assert first == 25
    assert not set(answered[:first]) & set(answered[first:]), "an answered call was asked again"
    usage = results.usage
    assert sum(role["cached"]["requests"] for role in usage.values()) == 25
    assert sum(role["asked"]["requests"] for role in usage.values()) == 56 - 25
    whole, _ = run_bench(config(server, tmp_path, out=str(tmp_path / "other")))
    assert (results.metrics, results.judgements) == (whole.metrics, whole.judgements)
    assert len(answered) == 56 + 56


# ---------------------------------------------------------------- the doors


def test_from_the_command_line_to_the_page(serve, her_nemo, tmp_path: Path) -> None:
    def script(request: dict, number: int) -> Reply:
        if role_of(request) == "worlds":
            return Reply(answer(named("wrong_fact", [3], 5)))
        return scripted(request, number)

    server = serve(script)
    seeds = write_seeds(tmp_path / "en.jsonl", SEED)
    one = config(server, tmp_path, seeds=seeds, turns=2, runs=1, out=str(tmp_path / "one"))
    assert evaluate_roleplay_bench.run(one) == 0
    asked = [
        word
        for role in ("actor", "user", "judge")
        for word in (f"{role}.endpoint={server.url}", f"{role}.model=m")
    ]
    done = her_nemo(
        "evaluate", "benchmark=roleplay_bench", f"seeds={seeds}", "out=two", "turns=2", "runs=1", *asked
    )
    assert done.returncode == 0, done.stderr
    results, scenes = read_results(tmp_path / "two")
    assert (len(scenes), results.scenes, results.valid) == (1, 1, True)
    # One turn of the character: Knowledge and Interaction are gone, so overall is 0.5 x 200 / 3 + 0.25 x 100 + 0.
    assert scenes[0].scores["overall"] == pytest.approx(100 / 3 + 25)
    assert f"-> {Path('two') / 'results.json'}" in done.stdout
    done = her_nemo("evaluate", "compare", "one", "two", "out=page.html", "labels=[before,after]")
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "after − before" in page
    refused = CompareConfig(name="c", runs=["one", "nowhere"], out="page.html")
    assert "nowhere: has no results.json" in [problem.message for problem in comparison(refused)]


def test_what_is_missing_is_said_at_once(her_nemo, tmp_path: Path) -> None:
    done = her_nemo("evaluate", "benchmark=roleplay_bench", "seeds=none.jsonl", "prompts_dir=none")
    assert done.returncode == 2
    for said in (
        "none.jsonl: no such file",
        "none: no such directory",
        "actor.endpoint",
        "user.endpoint",
        "judge.endpoint",
    ):
        assert said in done.stderr, said
