"""The wire against a real vLLM server: a tiny random Qwen3 writes whatever it likes, inside the schema."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import samples

from her_nemo.data.synthesis import principles, role_thinking, system_thinking
from her_nemo.data.synthesis import settings as settings_step
from her_nemo.data.synthesis.asker import Asker, Bill, Quarantined
from her_nemo.data.synthesis.cache import AnswerCache
from her_nemo.data.synthesis.endpoint import Endpoint
from her_nemo.data.synthesis.prompt_files import PromptFile

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LENGTH = 8192


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of about half a million parameters over a byte-level tokenizer."""
    from tiny_qwen3 import tiny_model

    from her_nemo.data.tokenizer import train_tokenizer

    out = tmp_path_factory.mktemp("model")
    text = json.dumps(samples.small().to_row())
    tokenizer = train_tokenizer([text, *map(str, range(100))], out, 512)
    tiny_model(
        out, tokenizer=tokenizer, vocab_size=512, hidden_size=256, intermediate_size=256, max_position_embeddings=LENGTH
    )
    return out


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server of that model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--max-model-len", str(LENGTH), "--max-num-seqs", "4", "--dtype", "float32",
        "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
    ]  # fmt: skip
    with log.open("w") as out:
        # A session of its own: the engine is a child of the server and must go with it, whatever happens.
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 540
        while time.monotonic() < deadline:
            if server.poll() is not None:
                pytest.fail(f"the server ended with {server.returncode}:\n{log.read_text()[-4000:]}")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server is not up after 540 s:\n{log.read_text()[-4000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


ANSWERS = [
    principles.CaseAnswer,
    principles.DistilledPrinciple,
    role_thinking.RoleThinkingAnswer,
    settings_step.GapsAnswer,
    settings_step.LookupAnswer,
    system_thinking.ForwardAnswer,
    system_thinking.RewriteAnswer,
]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.__name__)
def test_the_server_takes_every_schema(url, settings, tmp_path, answer) -> None:
    cfg = settings(url, tmp_path, model="tiny", sampling={"max_tokens": 48, "seed": 7})
    prompt = PromptFile("try", 1, "0" * 16, "You answer.", "Answer.")

    async def ask() -> tuple[Bill, Quarantined | None]:
        async with Endpoint(url, cfg.limits) as endpoint:
            asker = Asker(cfg, endpoint, AnswerCache(tmp_path / "cache"), await endpoint.identity("tiny"))
            try:
                await asker.ask(prompt, prompt.messages(), answer, lambda given: [])
            except Quarantined as stopped:
                return asker.asked, stopped
            return asker.asked, None

    bill, stopped = asyncio.run(ask())
    assert bill.completion_tokens > 0
    if stopped is not None:  # random words seldom close a string in time
        assert {fault.kind for fault in stopped.faults} <= {"truncated", "control_character"}
        # As far as it came, it is an object that begins as the schema says.
        assert stopped.answer.startswith('{"' + next(iter(answer.model_fields)))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_answers_follow_the_schema_of_every_step(url, model, settings, synthesise, tmp_path) -> None:
    source = samples.write(tmp_path / "in.jsonl", [samples.small(turns=2)])
    cfg = settings(
        url,
        source,
        stage="all",
        model="tiny",
        attempts=2,
        keep_quarantined=True,  # random words keep no rule: every step is to be tried all the same
        sampling={"temperature": 1.0, "max_tokens": 400, "seed": 1},
        limits={"timeout_seconds": 120.0, "concurrency": 2},
    )
    synthesise(cfg)
    out = Path(cfg.out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["identity"] == {"model": "tiny", "root": str(model)}
    assert summary["usage"]["this_run"]["requests"] > 0
    assert summary["usage"]["this_run"]["completion_tokens"] > 0
    assert summary["usage"]["this_run"]["without_usage"] == 0
    faults = {
        fault["kind"]
        for row in rows(out / "provenance.jsonl")
        for a in row["answers"]
        for fault in a["faults"]
    }
    assert not {kind for kind in faults if kind.startswith("endpoint_")}, faults
    # Whatever was finished within max_tokens is of the schema: xgrammar saw to it.
    assert not faults & {"bad_json", "bad_schema"}, faults
    stored = [json.loads(file.read_text()) for file in (out / "cache").rglob("*.json")]
    assert any(body["completion"]["finish_reason"] == "stop" for body in stored), "one ended by itself"
    schemas = {body["request"]["response_format"]["json_schema"]["name"] for body in stored}
    assert {"RoleThinkingAnswer", "ForwardAnswer", "GapsAnswer"} <= schemas
    again = summary["usage"]["this_run"]["requests"]
    synthesise(cfg)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["usage"]["this_run"]["requests"] == 0
    assert summary["usage"]["from_cache"]["requests"] == again
