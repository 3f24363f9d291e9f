"""The Slurm scripts without Slurm: shellcheck, preflight, two real ranks, stop, requeue and going on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_stand_in import CALLS, install
from stage_files import Place, curve

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "tools" / "local_slurm.sh"]
PARTS = ("common.sh", "servers.sh", "local_slurm.sh")  # no jobs of their own
JOBS = [script for script in SCRIPTS if script.name not in PARTS]
STEPS = 12


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck(script: Path) -> None:
    done = subprocess.run(
        ["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda script: script.name)
def test_every_job_can_be_stopped_requeued_and_runs_once_at_a_time(script: Path) -> None:
    text = script.read_text()
    for line in ("--requeue", "--signal=B:TERM@300", "--dependency=singleton", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text, line
    assert "\nset -euo pipefail\n" in text


class Job:
    """One job on the stand-in Slurm: the same directory over its restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.binaries = install(folder / "slurm")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *overrides: str, restarts: int = 0, tasks: int = 2) -> subprocess.Popen[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HER_NEMO_"))},
            "PATH": f"{self.binaries}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": str(30_000 + os.getpid() % 10_000), "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_RESTART_COUNT": str(restarts), "HER_NEMO_REPO": str(ROOT),
            "HER_NEMO_VENV": sys.prefix, "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *overrides], env=environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def close(self) -> None:
        """Leave nothing running: each job is a session of its own."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def calls(self) -> list[str]:
        file = self.folder / "slurm" / CALLS
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    made.close()


def sft(place: Place, out: Path) -> list[str]:
    return [
        "trainer.accelerator=cpu", f"trainer.sft.max_steps={STEPS}", "trainer.sft.save_interval=100",
        "trainer.sft.max_epochs=5", "model.micro_batch_size=4", "model.global_batch_size=8",
        "model.encoder_seq_length=256", "model.tensor_model_parallel_size=2", "model.optim.lr=1e-3",
        f"model.data.train_ds.file_path={place.world}/sft_train.jsonl",
        f"pretrained_checkpoint.restore_from_path={place.model}", f"exp_manager.explicit_log_dir={out}",
    ]  # fmt: skip


def steps_done(out: Path) -> list[int]:
    file = out / "metrics.jsonl"
    rows = (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )
    return [row["step"] for row in rows if row["tag"] == "train/loss"]


@pytest.mark.slow
@pytest.mark.parallel
def test_told_to_stop_it_saves_requeues_and_goes_on(place: Place, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = job.start("sft.sh", *sft(place, out))
    deadline = time.monotonic() + 900
    while len(steps_done(out)) < 2:
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < deadline, "no second step"
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=900)
    assert first.returncode == 0, said
    assert "preflight of sft: nothing wrong" in said
    assert "told to stop" in said
    assert len(job.calls) == 1, said
    assert job.calls[0].startswith("requeue ")
    stopped = steps_done(out)
    assert len(stopped) < STEPS
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{stopped[-1]:08d}"

    second = job.start("sft.sh", *sft(place, out), restarts=1)
    said, _ = second.communicate(timeout=900)
    assert second.returncode == 0, said
    assert "start 2" in said
    assert "sft is done" in said
    assert len(job.calls) == 1
    assert steps_done(out) == list(range(1, STEPS + 1))
    assert len(curve(out, "train/loss")) == STEPS


def test_a_job_whose_preflight_fails_starts_nothing(place: Place, job: Job, tmp_path: Path) -> None:
    wrong = job.start(
        "sft.sh",
        *sft(place, tmp_path / "run"),
        "model.global_batch_size=7",
        "model.data.train_ds.file_path=/no",
    )
    said, _ = wrong.communicate(timeout=900)
    assert wrong.returncode == 2, said
    assert "use model.global_batch_size=8" in said
    assert "/no: no such file" in said
    assert "nothing was started" in said
    assert not (tmp_path / "run").exists()
    assert job.calls == []
