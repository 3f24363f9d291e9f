"""PPO with a judge behind a real vLLM server, which holds its answers to the verdict's schema."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from judge_model import rows, train_judge
from stage_files import Place, curve
from test_ppo_algorithms import overrides

from her_nemo.roleplay.verdict import Winner, parse_verdict

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.parallel]

JUDGE = "reward.generative.judge"
START_SECONDS = 580


@pytest.fixture(scope="module")
def model(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_judge(place, tmp_path_factory.mktemp("judge"), head_dim=32)  # the smallest that vLLM has on CPU


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "grm",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-num-seqs", "16", "--dtype", "float32",
        "--chat-template", "her_nemo/roleplay/chat_template.jinja",
        "--structured-outputs-config", '{"backend":"xgrammar","disable_any_whitespace":true}',
    ]  # fmt: skip
    with log.open("w") as out:
        # A session of its own: the engine is a child of the server and must go with it, whatever happens.
        server = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(port):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).is_success
    except httpx.TransportError:
        return False


def test_verdicts_with_and_without_the_schema(place: Place, url: str, model: Path) -> None:
    from her_nemo.config.rl import JudgeSource
    from her_nemo.megatron import parallel
    from her_nemo.rewards.judge_server import ServerJudge

    parallel.initialize()
    try:
        for structured in (True, False):
            keys = JudgeSource(servers=[url], model="grm", max_tokens=200, structured_output=structured)
            judge = ServerJudge(keys)
            assert judge.identity["judge"] == {"model": "grm", "served": [str(model)]}
            answers = judge.ask(rows(place.world, 6, seed=2))
            assert [parse_verdict(answer.text or "").better for answer in answers] == [Winner.CAND_1] * 6
    finally:
        parallel.destroy()


def test_a_run_is_judged(place: Place, url: str, stage: Callable[..., None], tmp_path: Path) -> None:
    given = {
        "algorithm": "her", "model.ppo.num_samples_per_prompt": 4, "reward.kind": "mix", "reward.mix.scalar": 0.0,
        "reward.mix.generative": 1.0, f"{JUDGE}.servers": f"['{url}']", f"{JUDGE}.model": "grm", f"{JUDGE}.brief": True,
        f"{JUDGE}.max_tokens": 200, "trainer.ppo.max_steps": 2,
    }  # fmt: skip
    stage("ppo", *overrides(place, tmp_path, **given), "trainer.devices=2")
    assert curve(tmp_path, "reward/generative_unparsed") == [0.0, 0.0]
    assert min(curve(tmp_path, "reward/disagreed")) > 0.5
