"""The job scripts under a real Slurm of two nodes on this machine (tools/local_slurm.sh): time limit, requeue, servers.

Steps of the tiny model take a tenth of a second or so; Slurm looks at time limits every 30 seconds, so a run needs some
hundreds of them to be caught by its limit. Deadlines are for a machine that others use as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage_files import Place

ROOT = Path(__file__).resolve().parents[2]
LOCAL_SLURM = ROOT / "tools" / "local_slurm.sh"
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")
DEADLINE = 1200
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
SFT_STEPS, PPO_STEPS = 400, 8
# One task a node unless a test says otherwise; two nodes share this machine's cores.
SMALL = ["--cpus-per-task=1", "--gpus-per-node=0"]
VLLM = {"VLLM_ARGS": "--max-model-len 256 --max-num-seqs 4", "VLLM_TP": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.parallel]


class Slurm:
    """A running cluster; `submit` is sbatch as a user calls it, from `folder`."""

    def __init__(self, configuration: Path, folder: Path) -> None:
        self.folder = folder
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "SBATCH_", "HER_NEMO_", "VLLM_"))
        }
        self.environment = clean | {
            "SLURM_CONF": str(configuration), "HER_NEMO_REPO": str(ROOT), "HER_NEMO_VENV": sys.prefix,
            "GLOO_SOCKET_IFNAME": "lo", "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin",
        }  # fmt: skip

    def __call__(self, *words: str, **variables: str) -> str:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment | variables, capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, options: list[str], script: str, overrides: list[str], **variables: str) -> str:
        said = self("sbatch", *SMALL, *options, str(ROOT / "slurm" / script), *overrides, **variables)
        return said.split()[-1]

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it, and its steps."""
        said = self("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, number: str, until: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not until():
            state = self.job(number)["JobState"]
            assert state not in OVER, f"{state} before {what}:\n{self.said(number)}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.said(number)}"
            time.sleep(0.5)

    def end(self, number: str) -> dict[str, str]:
        """What became of a job, once it is over."""
        deadline = time.monotonic() + DEADLINE
        while (found := self.job(number))["JobState"] not in OVER:
            assert time.monotonic() < deadline, f"not over:\n{self.said(number)}"
            time.sleep(0.5)
        return found

    def limit(self, number: str, minutes: int) -> None:
        self("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    def said(self, number: str) -> str:
        """The job's own output, and the last lines of its processes'."""
        files = [*self.folder.glob(f"*-{number}.out"), *(self.folder / "logs" / number).glob("*.txt")]
        return "\n".join(
            f"== {file.name}\n" + "\n".join(file.read_text().splitlines()[-40:]) for file in files
        )


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """slurm.conf of a cluster of two nodes that runs for this module."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(
            f"no Slurm here: {', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)"
        )
    folder = tmp_path_factory.mktemp("cluster")
    port = str(30_000 + os.getpid() % 10_000)
    started = subprocess.run(
        ["bash", str(LOCAL_SLURM), "start", str(folder), "2"],
        env={**os.environ, "LOCAL_SLURM_PORT": port}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if started.returncode != 0:
        pytest.skip(f"Slurm does not run here: {(started.stdout + started.stderr)[-2000:]}")
    yield folder / "slurm.conf"
    subprocess.run(["bash", str(LOCAL_SLURM), "stop", str(folder)], check=True, timeout=300)


@pytest.fixture
def slurm(configuration: Path, tmp_path: Path) -> Iterator[Slurm]:
    cluster = Slurm(configuration, tmp_path)
    yield cluster
    cluster("scancel", f"--user={os.environ.get('USER', 'root')}")


def sft(place: Place, out: Path) -> list[str]:
    return [
        "trainer.accelerator=cpu", f"trainer.sft.max_steps={SFT_STEPS}", "trainer.sft.save_interval=100000",
        "trainer.sft.max_epochs=1000", "model.micro_batch_size=4", "model.global_batch_size=8",
        "model.encoder_seq_length=256", "model.tensor_model_parallel_size=2", "model.optim.lr=1e-3",
        f"model.data.train_ds.file_path={place.world}/sft_train.jsonl",
        f"pretrained_checkpoint.restore_from_path={place.model}", f"exp_manager.explicit_log_dir={out}",
    ]  # fmt: skip


def ppo(place: Place, out: Path, steps: int) -> list[str]:
    """The reward model is the language model with a fresh scalar head: what it rewards does not matter here."""
    return [
        "trainer.accelerator=cpu", f"trainer.ppo.max_steps={steps}", "trainer.ppo.save_interval=100000",
        "model.micro_batch_size=4", "model.global_batch_size=8", "model.encoder_seq_length=256",
        "model.ppo.num_rollout_samples=8", "model.ppo.num_val_samples=0", "model.ppo.length_params.max_length=12",
        f"model.data.train_ds.file_path={place.world}/prompts_train.jsonl",
        f"pretrained_checkpoint.restore_from_path={place.model}", f"reward.restore_from_path={place.model}",
        f"exp_manager.explicit_log_dir={out}",
    ]  # fmt: skip


def steps_of(out: Path, tag: str) -> list[int]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if row["tag"] == tag]


def stopped_and_gone_on(
    slurm: Slurm, number: str, out: Path, tag: str, steps: int, stop: Callable[[], object]
) -> None:
    """At the second step stop a job, see it save and requeue, and wait for its end."""
    slurm.wait(number, lambda: len(steps_of(out, tag)) >= 2, "second step")
    stop()
    slurm.wait(number, lambda: slurm.job(number)["Restarts"] == "1", "requeue")
    slurm.limit(number, 60)
    stopped = steps_of(out, tag)[-1]
    assert stopped < steps, "it was through before Slurm looked at its limit"
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{stopped:08d}"
    found = slurm.end(number)
    said = slurm.said(number)
    assert found["JobState"] == "COMPLETED", said
    assert "told to stop; the ranks save and end" in said
    assert "start 2, logs in" in said
    assert steps_of(out, tag) == list(range(1, steps + 1))


def test_sft_on_two_nodes_meets_its_time_limit_and_goes_on(
    place: Place, slurm: Slurm, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--nodes=2", "--ntasks-per-node=1", "--time=60"]
    number = slurm.submit(options, "sft.sh", sft(place, out))
    # Five minutes are left of it, and --signal=B:TERM@300 asks for the warning five minutes before the end.
    stopped_and_gone_on(slurm, number, out, "train/loss", SFT_STEPS, lambda: slurm.limit(number, 6))
    said = slurm.said(number)
    assert "preflight of sft: nothing wrong" in said
    assert "her-nemo: sft is done" in said
    ranks = (tmp_path / "logs" / number / "ranks_1.txt").read_text()
    assert re.search(r"^0: sft: ", ranks, re.MULTILINE), ranks


def test_rl_is_told_to_stop_and_goes_on(place: Place, slurm: Slurm, tmp_path: Path) -> None:
    """The signal is Slurm's own, but sent at once: to the script alone, as --signal=B: does."""
    out = tmp_path / "run"
    options = ["--nodes=1", "--ntasks-per-node=2", "--time=60"]
    number = slurm.submit(options, "rl.sh", ppo(place, out, PPO_STEPS))
    stopped_and_gone_on(
        slurm, number, out, "train_rollouts/rewards", PPO_STEPS,
        lambda: slurm("scancel", "--batch", "--signal=TERM", number),
    )  # fmt: skip


def test_a_job_that_is_cancelled_stays_so(place: Place, slurm: Slurm, tmp_path: Path) -> None:
    number = slurm.submit(
        ["--nodes=1", "--ntasks-per-node=2", "--time=60"], "sft.sh", sft(place, tmp_path / "run")
    )
    slurm.wait(number, lambda: "preflight of sft" in slurm.said(number), "preflight")
    slurm("scancel", number)
    assert slurm.end(number)["JobState"] == "CANCELLED"
    deadline = time.monotonic() + DEADLINE
    while slurm("squeue", "--noheader"):  # its script may still be ending
        assert time.monotonic() < deadline
        time.sleep(0.5)
    found = slurm.job(number)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), slurm.said(number)


@pytest.mark.vllm
def test_rl_with_a_server_on_a_node_of_its_own(wide: Place, slurm: Slurm, tmp_path: Path) -> None:
    out, port = tmp_path / "run", str(40_000 + os.getpid() % 10_000)
    variables = {"VLLM_NODES": "1", "VLLM_MODEL": str(wide.model), "VLLM_PORT": port, **VLLM}
    options = ["--nodes=2", "--ntasks-per-node=1", "--time=60"]
    number = slurm.submit(options, "rl.sh", ppo(wide, out, 2), **variables)
    found = slurm.end(number)
    said = slurm.said(number)
    assert found["JobState"] == "COMPLETED", said
    assert "the servers are ready after" in said
    assert f"http://127.0.0.2:{port}" in said  # the second node's
    assert steps_of(out, "train_rollouts/rewards") == [1, 2]
    assert set(steps_of(out, "rollout/weight_version")) == {1, 2}
    assert "ranks_0.txt" in said
    assert listeners(port) == [], "the server outlived its job"


@pytest.mark.vllm
def test_a_server_that_is_not_ready_in_time_takes_the_job_down(
    wide: Place, slurm: Slurm, tmp_path: Path
) -> None:
    out, port = tmp_path / "run", str(41_000 + os.getpid() % 10_000)
    variables = {
        "VLLM_NODES": "1", "VLLM_MODEL": str(wide.model), "VLLM_PORT": port, "VLLM_DEADLINE": "1", **VLLM
    }  # fmt: skip
    number = slurm.submit(
        ["--nodes=2", "--ntasks-per-node=1", "--time=60"], "rl.sh", ppo(wide, out, 2), **variables
    )
    found = slurm.end(number)
    said = slurm.said(number)
    assert found["JobState"] == "FAILED", said
    assert found["ExitCode"] == "4:0"
    assert "did not answer within 1 s (VLLM_DEADLINE)" in said
    assert not out.exists()
    assert listeners(port) == []


def test_more_servers_than_nodes_and_no_model_stop_in_the_preflight(
    place: Place, slurm: Slurm, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--nodes=1", "--ntasks-per-node=1", "--time=60"]
    number = slurm.submit(options, "rl.sh", ppo(place, out, 2), VLLM_NODES="1")
    assert slurm.end(number)["ExitCode"] == "2:0"
    said = slurm.said(number)
    assert "VLLM_NODES=1, but the job has 1 node(s) and one has to train" in said
    assert "nothing was started" in said
    assert not out.exists()


def listeners(port: str) -> list[str]:
    """Sockets that listen on a port of this machine (/proc/net/tcp, state 0A)."""
    wanted = f":{int(port):04X}"
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and local.endswith(wanted):
                found.append(line)
    return found
