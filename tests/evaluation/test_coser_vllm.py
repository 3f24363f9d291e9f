"""CoSER's benchmark against a real vLLM server: a random model plays every part and judges inside the schema."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import coser_script
import pytest

from her_nemo.config.evaluation import CoserConfig
from her_nemo.evaluation.coser import benchmark_prompt, roles_of, run_coser
from her_nemo.evaluation.endpoint import fingerprint
from her_nemo.evaluation.results import read_results
from her_nemo.evaluation.servers import served

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random Qwen3 of about half a million parameters over a byte-level tokenizer."""
    from tiny_qwen3 import tiny_model

    from her_nemo.data.tokenizer import train_tokenizer

    out = tmp_path / "model"
    out.mkdir()
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


def test_a_checkpoint_plays_and_judges(model, tmp_path) -> None:
    scenes = coser_script.write_scenes(tmp_path / "scenes.json", coser_script.scene())
    who = {"checkpoint": str(model)}
    cfg = CoserConfig(
        name="wire",
        out=str(tmp_path / "out"),
        scenes=str(scenes),
        max_rounds=3,
        actor=who | {"sampling": {"temperature": 1.0, "max_tokens": 24, "seed": 1}},
        next_speaker={"sampling": {"temperature": 1.0, "max_tokens": 12, "seed": 2}},
        environment={"sampling": {"temperature": 1.0, "max_tokens": 24, "seed": 3}},
        judge=who | {"sampling": {"temperature": 1.0, "max_tokens": 400, "seed": 4}, "attempts": 4},
        server={"max_num_seqs": 4},
        limits={"concurrency": 4, "timeout_seconds": 200.0},
    )
    with served(roles_of(cfg), cfg.server, tmp_path / "out") as (roles, identities):
        assert len({chat.endpoint for chat in roles.values()}) == 1, "one server for one directory"
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
