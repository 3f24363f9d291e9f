"""PPO with vLLM servers as rollout engine, run as a user runs it: layouts, one step off, servers that die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import family, running
from stage_files import Place, curve, summary

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.parallel]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 580
LENGTH = 384


def overrides(place: Place, out: Path, *, steps: int, layout: tuple[int, int], **changes: object) -> list[str]:
    values = {
        "model.data.train_ds.file_path": place.world / "prompts_train.jsonl",
        "pretrained_checkpoint.restore_from_path": place.model,
        "reward.restore_from_path": place.model,  # a random head on the same model
        "exp_manager.explicit_log_dir": out,
        "model.encoder_seq_length": LENGTH,
        "model.micro_batch_size": 2,
        "model.global_batch_size": 4,
        "model.optim.lr": 1e-3,
        "critic.optim.lr": 1e-3,
        "model.ppo.rollout_engine": "vllm",
        "model.ppo.num_rollout_samples": 8,
        "model.ppo.length_params.max_length": 24,
        "trainer.ppo.max_steps": steps,
        "trainer.ppo.save_interval": 10_000,
        "trainer.devices": layout[0] * layout[1],
        "model.tensor_model_parallel_size": layout[0],
        "model.pipeline_model_parallel_size": layout[1],
        **changes,
    }
    return [f"{key}={value}" for key, value in values.items()]


class TestOneServerOfOurOwn:
    """A server that was there before the run, its address given."""

    @pytest.fixture(scope="class")
    def url(self, wide: Place, tmp_path_factory) -> Iterator[str]:
        from her_nemo.rollout.vllm_client import VllmServer
        from her_nemo.rollout.vllm_server import ServerOptions, started

        scratch = tmp_path_factory.mktemp("server")
        options = ServerOptions(wide.model, "float32", LENGTH, 16, 1, 0.9, False, "her_nemo_files")
        with started(options, scratch, [()]) as (process,):
            server, deadline = VllmServer(process.url), time.monotonic() + START_SECONDS
            while not server.healthy():
                assert process.ended() is None, process.ended()
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield process.url

    @pytest.fixture(scope="class")
    def runs(self) -> dict[str, Path]:
        """Finished runs, by layout."""
        return {}

    @pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
    def test_three_steps(self, wide, stage, url, runs, tmp_path_factory, layout) -> None:
        out = tmp_path_factory.mktemp("ppo")
        stage("ppo", *overrides(wide, out, steps=3, layout=layout, **{"model.ppo.vllm.servers": f"['{url}']"}))
        assert curve(out, "rollout/weight_version") == [0, 1, 2]
        assert curve(out, "rollout/staleness") == [0, 0, 0]
        assert summary(out)["logprob_gap_max"] < 1e-3
        assert abs(summary(out)["ratio_step0"] - 1.0) < 1e-5
        assert max(curve(out, "rollout/probe_gap_max")) < 1e-3
        lengths = curve(out, "train_rollouts/response_lengths")
        assert len(lengths) == 3
        assert min(lengths) > 1
        runs[str(layout)] = out

    def test_layouts_draw_the_same(self, runs) -> None:
        assert len(runs) == 2
        for tag in ("train_rollouts/rewards", "train_rollouts/response_lengths", "train_optim/loss"):
            found = [np.array(curve(out, tag)) for out in runs.values()]
            assert np.abs(found[0] - found[1]).max() < 1e-3, tag

    def test_one_step_off(self, wide, stage, url, runs, tmp_path) -> None:
        changes = {"model.ppo.vllm.servers": f"['{url}']", "model.ppo.one_step_off": "true"}
        stage("ppo", *overrides(wide, tmp_path / "run", steps=4, layout=(2, 1), **changes))
        out = tmp_path / "run"
        assert curve(out, "rollout/staleness") == [0, 1, 1, 1]
        assert curve(out, "rollout/weight_version") == [0, 0, 1, 2]
        assert max(curve(out, "rollout/probe_gap_max")) < 1e-3
        synchronous = curve(next(iter(runs.values())), "train_rollouts/rewards")
        assert curve(out, "train_rollouts/rewards")[0] == pytest.approx(synchronous[0], abs=1e-4)
        assert curve(out, "rollout/logprob_gap_max")[0] < 1e-3
        overlap, seconds = curve(out, "rollout/overlap"), curve(out, "timers/rollout")
        assert len(overlap) == len(seconds) == 4
        assert overlap[0] < 0.2  # nothing to hide behind
        assert min(overlap[1:]) > 0.3, list(zip(overlap, seconds, strict=True))
        # The next prompts were looked at, not used up: all steps saw other ones.
        assert json.loads((out / "summary.json").read_text())["seconds"] > 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def test_a_run_survives_one_server_and_ends_cleanly_without_the_last(wide: Place, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = overrides(wide, out, steps=100_000, layout=(2, 1), **{"model.ppo.vllm.num_servers": 2})

    def steps() -> int:
        return len(curve(out, "timers/step")) if (out / "metrics.jsonl").exists() else 0

    with log.open("w") as told:
        run = subprocess.Popen(
            [sys.executable, "-m", "her_nemo", "ppo", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=told, stderr=subprocess.STDOUT,
        )  # fmt: skip
    everyone: set[int] = set()
    try:
        wait_until(lambda: steps() >= 1, run, log, START_SECONDS)
        everyone = family(run.pid)
        guards = [int(pid) for pid in re.findall(r"rollout server \S+: process (\d+)", log.read_text())]
        assert len(guards) == 2
        servers = [min(family(guard) - {guard}) for guard in guards]
        os.kill(servers[0], signal.SIGKILL)
        there = steps()
        wait_until(lambda: steps() >= there + 3, run, log, 200)
        assert curve(out, "rollout/servers")[-1] == 1
        os.kill(servers[1], signal.SIGKILL)
        begun = time.monotonic()
        assert run.wait(timeout=60) == 2, log.read_text()[-4000:]
        assert time.monotonic() - begun < 60
        said = log.read_text()
        assert said.count("her-nemo: no rollout server is left: ") == 1, said[-4000:]
        assert "Traceback" not in said, said[-4000:]
    finally:
        if run.poll() is None:
            run.kill()
        deadline = time.monotonic() + 30
        while (left := {pid for pid in everyone if running(pid)}) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left
