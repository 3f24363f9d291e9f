"""CoSER's benchmark on a real vLLM server: a random model acts for a scripted judge, and judges in the schema."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coser_script
import pytest
from coser_script import cast

from her_nemo.config.evaluation import ChatModel, CoserConfig
from her_nemo.evaluation.coser import benchmark_prompt, roles_of, run_coser
from her_nemo.evaluation.endpoint import fingerprint
from her_nemo.evaluation.results import read_results
from her_nemo.evaluation.servers import Identities, served

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Serving = tuple[Path, dict[str, ChatModel], Identities]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of about half a million parameters over a byte-level tokenizer."""
    from tiny_qwen3 import tiny_model

    from her_nemo.data.tokenizer import train_tokenizer

    out = tmp_path_factory.mktemp("model")
    text = [
        json.dumps(coser_script.scene()),
        benchmark_prompt("coser_judge", None).system,
        *map(str, range(100)),
    ]
    tokenizer = train_tokenizer(text, out, 640)
    tiny_model(
        out,
        tokenizer=tokenizer,
        vocab_size=640,
        hidden_size=256,
        intermediate_size=256,
        max_position_embeddings=6144,
    )
    return out


def config(model: Path, out: Path, **keys: Any) -> CoserConfig:
    who = {"checkpoint": str(model)}
    given = {
        "name": "wire",
        "out": str(out),
        "scenes": str(coser_script.write_scenes(out.parent / "scenes.json", coser_script.scene())),
        "max_rounds": 3,
        "actor": who | {"sampling": {"temperature": 1.0, "max_tokens": 24, "seed": 1}},
        "next_speaker": {"sampling": {"temperature": 1.0, "max_tokens": 12, "seed": 2}},
        "environment": {"sampling": {"temperature": 1.0, "max_tokens": 24, "seed": 3}},
        "judge": who | {"sampling": {"temperature": 1.0, "max_tokens": 400, "seed": 4}, "attempts": 4},
        "server": {"max_num_seqs": 4},
        "limits": {"concurrency": 4, "timeout_seconds": 200.0},
    }
    return CoserConfig(**given | keys)


@pytest.fixture(scope="module")
def serving(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """(the model, the roles with the endpoint of the one server that plays them all, their identities)."""
    cfg = config(model, tmp_path_factory.mktemp("served") / "out")
    with served(roles_of(cfg), cfg.server, Path(cfg.out)) as (roles, identities):
        assert len({chat.endpoint for chat in roles.values()}) == 1, "one server for one directory"
        yield model, roles, identities


def test_a_checkpoint_acts_and_a_scripted_judge_scores(serving: Serving, serve, tmp_path: Path) -> None:
    model, roles, identities = serving
    others = serve(cast(order=("Bob", "Ann", "Environment")))
    scripted = ChatModel(endpoint=others.url, model="scripted")
    cfg = config(model, tmp_path / "out", max_rounds=6)
    cast_of = {"actor": roles["actor"]} | dict.fromkeys(("environment", "next_speaker", "judge"), scripted)
    results = asyncio.run(run_coser(cfg, cast_of, {"actor": identities["actor"]}))
    _, (scene,) = read_results(tmp_path / "out")
    assert [line.source for line in scene.dialogue].count("actor") == scene.info["actor_messages"] == 4
    # 100 - 5 x (14 - 1.2); no flaws; 100 - 5 x (3 - 1.2); 100 - 5 x (30 - 1.2), which is below zero.
    by_hand = {
        "Storyline Consistency": 36.0,
        "Anthropomorphism": 100.0,
        "Character Fidelity": 91.0,
        "Storyline Quality": 0.0,
        "Average": 56.75,
    }
    found = {metric.name: metric.interval.mean for metric in results.metrics}
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    assert results.valid
    assert results.models["actor"]["fingerprint"] == fingerprint(model)
    assert results.models["judge"] == {"model": "scripted", "endpoint": others.url}
    assert results.usage["actor"]["asked"]["requests"] == 4
    assert {coser_script.role_of(request) for request in others.requests} == {
        "environment", "next_speaker", "judge",
    }  # fmt: skip


def test_a_checkpoint_plays_all_and_judges_inside_the_schema(serving: Serving, tmp_path: Path) -> None:
    model, roles, identities = serving
    cfg = config(model, tmp_path / "out")
    results = asyncio.run(run_coser(cfg, roles, identities))
    asked = {role: usage["asked"]["requests"] for role, usage in results.usage.items()}
    again = asyncio.run(run_coser(cfg, roles, identities))
    assert asked["actor"] + asked["environment"] == 3
    assert asked["next_speaker"] == 2
    assert 4 <= asked["judge"] <= 16
    assert results.usage["judge"]["asked"]["completion_tokens"] > 0
    assert {usage["asked"]["requests"] for usage in again.usage.values()} == {0}
    assert results.models["actor"]["fingerprint"] == fingerprint(model)
    _, (scene,) = read_results(tmp_path / "out")
    assert [len(scene.dialogue), scene.ended, scene.failures] == [3, "rounds", ()]
    assert any(line.text for line in scene.dialogue)
    # Random words seldom close a string in time; what was closed is of the schema: xgrammar saw to it.
    scored = [judgement for judgement in scene.judgements if judgement.score is not None]
    failed = {judgement.failure.kind.value for judgement in scene.judgements if judgement.failure is not None}
    assert scored, failed
    assert failed <= {"truncated"}
    for judgement in scored:
        assert 0 <= judgement.score <= 100
        assert set(json.loads(judgement.answer)) == {judgement.dimension}
    assert again.metrics == results.metrics
