"""CoSER's benchmark end to end on a scripted endpoint: scores by hand, failures, kills, the public scenes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coser_script
import pytest
from coser_script import COSER_REPLY, HER_REPLY, cast, dimension_of, role_of
from scripted_endpoint import QUICK, Reply, ScriptedEndpoint

from her_nemo.config.evaluation import CoserConfig
from her_nemo.evaluation.results import read_results
from her_nemo.stages import evaluate_coser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two scenes that differ in the time of day."""
    second = coser_script.scene(i_c=2, scenario="A hall at noon.")
    return coser_script.write_scenes(tmp_path / "scenes.json", coser_script.scene(), second)


def config(server: ScriptedEndpoint, scenes: Path, out: Path, **keys: Any) -> CoserConfig:
    who = {"endpoint": server.url, "model": "scripted"}
    given = {
        "name": "test",
        "out": str(out),
        "scenes": str(scenes),
        "actor": who,
        "judge": who | keys.pop("judge", {}),
        "limits": QUICK | {"concurrency": 8},
    }
    return CoserConfig(**given | keys)


def run(server: ScriptedEndpoint, scenes: Path, out: Path, **keys: Any):
    assert evaluate_coser.run(config(server, scenes, out, **keys)) == 0
    return read_results(out)


def means(results) -> dict[str, float | None]:
    return {metric.name: metric.interval and metric.interval.mean for metric in results.metrics}


@pytest.mark.parametrize("protocol", ["upstream", "her", "fixed"])
def test_scores_by_hand(serve, scenes, tmp_path, capsys, protocol) -> None:
    reply = COSER_REPLY if protocol == "upstream" else HER_REPLY
    # Seven messages: five of characters, as long as the first speaker is one of them.
    order = ("Bob", "Ann", "Environment") if protocol == "fixed" else ("Ann", "Bob", "Environment")
    server = serve(cast(order=order, reply=reply))
    results, rows = run(server, scenes, tmp_path / "out", protocol=protocol)
    assert [len(row.dialogue) for row in rows] == [7, 7]
    assert {row.info["actor_messages"] for row in rows} == {5}
    # 100 - 5 x (14 - 1.5); no flaws; 100 - 5 x (3 - 1.5); 100 - 5 x (30 - 1.5), which is below zero.
    by_hand = {
        "Storyline Consistency": 37.5,
        "Anthropomorphism": 100.0,
        "Character Fidelity": 92.5,
        "Storyline Quality": 0.0,
        "Average": 57.5,
    }
    found = means(results)
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    for metric in results.metrics[:5]:
        assert (metric.interval.low, metric.interval.high) == (metric.interval.mean, metric.interval.mean)
    assert results.valid
    assert (results.judgements, results.judgements_failed, results.failures) == (8, 0, {})
    assert results.protocol == protocol
    assert results.models["judge"] == {"model": "scripted", "endpoint": server.url}
    first = next(j for j in rows[0].judgements if j.dimension == "Character Fidelity")
    assert [(flaw.severity, flaw.instance) for flaw in first.flaws] == [(1, "place 0"), (2, "place 1")]
    printed = capsys.readouterr().out
    assert "Average" in printed
    assert "57.5 [57.5, 57.5]" in printed
    # 2 scenes x (7 messages + 7 predictions + 4 judgements), none twice.
    assert len(server.requests) == 36
    assert results.usage["judge"]["asked"]["requests"] == 8


def test_gold_prefix_by_hand(serve, scenes, tmp_path) -> None:
    script = cast(order=("Bob", "Ann"), end_after=8)
    for protocol in ("fixed", "her"):
        _, (done,) = run(
            serve(script), scenes, tmp_path / protocol, protocol=protocol, continue_from=3, num_scenes=1
        )
        lines = done.dialogue
        assert [line.source for line in lines].count("given") == 3
        assert len(lines) == 8
        # Of the three given ones two are characters'.
        fresh = sum(line.source == "actor" for line in lines)
        given = sum(line.source == "given" and line.speaker != "Environment" for line in lines)
        counted = fresh if protocol == "fixed" else fresh + given
        assert done.info["actor_messages"] == counted
        assert done.scores["Storyline Consistency"] == pytest.approx(100 - 5 * (14 - 0.3 * counted))


def test_runs_are_asked_apart_and_summed_up_by_scene(serve, scenes, tmp_path) -> None:
    severities = {0: [1, 1, 1, 1], 1: [4, 4, 4, 4]}

    def judge(request: dict[str, Any]) -> Reply:
        run_number = request["seed"] // 3 - 1  # three attempts a run, from seed 3 on
        dimension = dimension_of(request)
        return Reply(coser_script.judgement(dimension, severities[run_number]))

    server = serve(cast(order=("Bob", "Ann"), judge=judge))
    results, rows = run(
        server, scenes, tmp_path / "out", runs=2, judge={"sampling": {"seed": 3}}
    )  # fmt: skip
    assert [(row.scene_id, row.run) for row in rows] == [
        ("The Tale-3-1", 0), ("The Tale-3-2", 0), ("The Tale-3-1", 1), ("The Tale-3-2", 1),
    ]  # fmt: skip
    average = results.metrics[0]
    # Seven messages of characters: 100 - 5 x (4 - 2.1) and 100 - 5 x (16 - 2.1).
    assert average.run_means == pytest.approx((90.5, 30.5))
    assert average.interval.mean == pytest.approx(60.5)
    assert average.interval.scenes == 2
    assert len(server.requests) == 4 * 18


def test_failed_judgements_are_counted_and_never_scored(serve, scenes, tmp_path, capsys) -> None:
    def judge(request: dict[str, Any]) -> Reply:
        dimension = dimension_of(request)
        return {
            "Anthropomorphism": Reply("I'm sorry, but I can't help with that."),
            "Character Fidelity": Reply("It was quite good, seven of ten."),
            "Storyline Quality": Reply(coser_script.judgement(dimension, ["severe"])),
        }.get(dimension, Reply(coser_script.judgement(dimension, [1])))

    server = serve(cast(order=("Bob", "Ann"), judge=judge))
    results, rows = run(server, scenes, tmp_path / "out", judge={"attempts": 2})
    found = means(results)
    assert found["Storyline Consistency"] == pytest.approx(100.0)
    for name in ("Anthropomorphism", "Character Fidelity", "Storyline Quality", "Average"):
        assert found[name] is None
    assert results.failures == {"judge": {"refused": 2, "unparsable": 4}}
    assert (results.judgements, results.judgements_failed, results.valid) == (8, 6, False)
    assert all(
        metric.missing == 2 for metric in results.metrics if metric.name in ("Average", "Anthropomorphism")
    )
    assert set(rows[0].scores) == {"Storyline Consistency", "BLEU", "ROUGE-L", "messages"}
    printed = capsys.readouterr().out
    assert "INVALID: 6 of 8 judgements failed (75%, more than max_failure_share = 5%)" in printed
    assert "refused 2" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["valid"] is False


def test_a_dialogue_that_fails_is_not_judged(serve, scenes, tmp_path) -> None:
    fine = cast(order=("Bob", "Ann"))

    def script(request: dict[str, Any], number: int) -> Reply:
        if role_of(request) == "actor" and len(request["messages"]) > 4:
            return Reply(status=400, text="the context is too long")
        return fine(request, number)

    results, rows = run(serve(script), scenes, tmp_path / "out")
    assert (results.judgements, results.simulations_failed, results.valid) == (0, 2, False)
    assert results.failures == {"actor": {"endpoint": 2}}
    assert {row.ended for row in rows} == {"failed"}
    assert all(metric.interval is None for metric in results.metrics)
    assert "too long" in rows[0].failures[0].message


@pytest.mark.parametrize("protocol", ["upstream", "her", "fixed"])
def test_the_public_scenes_run_through(serve, shared_data, tmp_path, protocol) -> None:
    reply = COSER_REPLY if protocol == "upstream" else HER_REPLY
    server = serve(cast(reply=reply, end_after=12))
    path = shared_data / "coser" / "test_set_sample.json"
    results, rows = run(server, path, tmp_path / "out", protocol=protocol, continue_from=2)
    assert [row.scene_id for row in rows] == ["King Lear-17-0", "King Lear-16-0", "Othello-9-0"]
    assert {len(row.dialogue) for row in rows} == {12}
    assert results.valid
    for row in rows:
        messages = row.info["actor_messages"]
        assert row.scores["Character Fidelity"] == pytest.approx(min(100, 100 - 5 * (3 - 0.3 * messages)))
        assert row.scores["Storyline Consistency"] == pytest.approx(100 - 5 * (14 - 0.3 * messages))
        assert 0 <= row.scores["ROUGE-L"] < 1
    shown = [request for request in server.requests if role_of(request) == "judge"]
    assert len(shown) == 12
    assert sum("do you not see how she leans" in request["messages"][0]["content"] for request in shown) == 4


# ---------------------------------------------------------------- killed


def command(server: ScriptedEndpoint, scenes: Path, out: Path) -> list[str]:
    who = [
        f"{role}.{key}"
        for role in ("actor", "judge")
        for key in (f"endpoint='{server.url}'", "model=scripted")
    ]
    return [
        sys.executable, "-m", "her_nemo", "evaluate", "benchmark=coser", "name=killed", f"scenes='{scenes}'",
        f"out='{out}'", *who, "limits.concurrency=4",
    ]  # fmt: skip


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("answered", [5, 31])
def test_killed_and_run_again_nothing_is_asked_twice(serve, scenes, tmp_path, answered) -> None:
    fine = cast(order=("Bob", "Ann", "Environment"))

    def stalls(request: dict[str, Any], number: int) -> Reply:
        reply = fine(request, number)
        if number >= answered:
            reply.delay = 60.0
        return reply

    whole = serve(fine)
    results, rows = run(whole, scenes, tmp_path / "whole")
    asked = [json.dumps(request, sort_keys=True) for request in whole.requests]
    assert len(asked) == len(set(asked)) == 36

    out, scripts = tmp_path / "killed", [stalls]
    server = serve(lambda request, number: scripts[-1](request, number))
    first = start(command(server, scenes, out))
    try:
        wait_for(
            lambda: len(list((out / "cache").rglob("*.json"))) == answered and len(server.requests) > answered
        )
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert not (out / "results.json").exists()
    scripts.append(fine)
    before = len(server.requests)
    done = {json.dumps(request, sort_keys=True) for request in server.requests[:answered]}
    # In this process: what was kept is on disk only, and another interpreter costs seconds.
    now, rows_now = run(server, scenes, out)
    again = [json.dumps(request, sort_keys=True) for request in server.requests[before:]]
    assert not done & set(again), "a call that was answered is not repeated"
    assert sorted([*done, *again]) == sorted(asked), "and none is left out"
    assert now.metrics == results.metrics
    assert [row.dialogue for row in rows_now] == [row.dialogue for row in rows]
    assert now.usage["judge"]["asked"]["requests"] + now.usage["judge"]["cached"]["requests"] == 8
    # Once more: everything is there.
    before = len(server.requests)
    once_more, _ = run(server, scenes, out)
    assert len(server.requests) == before
    assert once_more.metrics == results.metrics
