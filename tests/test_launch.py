"""The launcher with real processes: ranks, exit codes, one message for a user error, signals, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module the launcher starts; what each rank does is the first argument. cli.main's handling of errors is used.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from her_nemo import cli, launch
from her_nemo.config.errors import UserError

rank, what, folder = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])

def act(words):
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if what == "environment":
        print(rank, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], flush=True)
    if what == "user_error_everywhere":
        raise UserError("the key is wrong")
    if what == "user_error_on_1":
        if rank == 1:
            raise UserError("line 7 is malformed")
        time.sleep(1)
        raise RuntimeError("connection closed by peer")
    if what == "crash_on_1":
        if rank == 1:
            raise ValueError("a bug")
        time.sleep(60)
    if what == "killed_on_0":
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if what == "save_on_term":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        (folder / f"ready{rank}").touch()
        while not stopped:
            time.sleep(0.02)
        (folder / f"saved{rank}").touch()
    return 0

cli._dispatch = act
sys.exit(cli.main([]))
"""
LAUNCHER = (
    "import sys; from her_nemo import launch; "
    "sys.exit(launch.run(sys.argv[1:], processes=2, module='launched_worker'))"
)


@pytest.fixture
def command(tmp_path: Path):
    (tmp_path / "launched_worker.py").write_text(WORKER)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])

    def start(what: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, what, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip

    return start


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"never appeared: {files}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not looked is dead all the same.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_ranks_and_their_output(command) -> None:
    code, out, error = result(command("environment"))
    assert code == 0
    assert out == "0 0 2 1\n"
    assert error == "[rank 1] 1 1 2 1\n"


def test_the_same_user_error_of_all_ranks_is_shown_once(command) -> None:
    assert result(command("user_error_everywhere")) == (2, "", "her-nemo: the key is wrong\n")


def test_a_user_error_of_one_rank_silences_the_failures_it_causes(command) -> None:
    assert result(command("user_error_on_1")) == (2, "", "her-nemo: rank 1: line 7 is malformed\n")


def test_a_crash_shows_its_traceback_and_ends_the_others(command, tmp_path: Path) -> None:
    code, _, error = result(command("crash_on_1"))
    assert code == 1
    assert "[rank 1] ValueError: a bug" in error
    assert error.endswith("her-nemo: rank 1 of 2 failed with exit code 1; the others were ended\n")
    assert not alive(int((tmp_path / "pid0").read_text()))


def test_a_killed_rank(command) -> None:
    code, _, error = result(command("killed_on_0"))
    assert code == 128 + signal.SIGKILL
    assert "rank 0 of 2 was killed by signal 9" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(command, tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGINT:
        (tmp_path / "launched_worker.py").write_text(
            WORKER.replace("signal.SIGTERM, lambda", "signal.SIGINT, lambda")
        )
    process = command("save_on_term")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(number)
    code, _, error = result(process)
    assert (code, error) == (0, "")
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_process_is_left_when_the_launcher_is_killed(command, tmp_path: Path) -> None:
    process = command("save_on_term")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.kill()
    process.communicate(timeout=10)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
