"""Runs a function in several processes over gloo and returns what each rank returned.

`run(nprocs, "path/to/file.py:function", args)` starts the processes as torchrun would. The function takes one
dict and returns something JSON can hold. If a rank fails, the others are stopped and its traceback is raised.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, nprocs: int, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nprocs), LOCAL_WORLD_SIZE=str(nprocs),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
        PYTHONPATH=os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]), PYTHONWARNINGS="ignore",
    )
    return environment


def run(nprocs: int, target: str, args: dict[str, Any] | None = None, timeout: float = 300) -> list[Any]:
    """Results of ranks 0 .. nprocs - 1. AssertionError with the first failing rank's traceback or on timeout."""
    with tempfile.TemporaryDirectory() as scratch:
        port = _free_port()
        (Path(scratch) / "args.json").write_text(json.dumps(args or {}))
        processes, logs = [], []
        for rank in range(nprocs):
            log = (Path(scratch) / f"{rank}.log").open("w+")
            logs.append(log)
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, target, scratch],
                    env=_environment(rank, nprocs, port), stdout=log, stderr=subprocess.STDOUT, cwd=scratch,
                )
            )
        try:
            _wait(processes, logs, target, timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for log in logs:
                log.close()
        return [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(nprocs)]


def _wait(processes: list[subprocess.Popen], logs: list[Any], target: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                raise AssertionError(f"rank {rank} of {target} exited with {code}:\n{_tail(logs[rank])}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            said = "\n".join(f"--- rank {rank}\n{_tail(log)}" for rank, log in enumerate(logs))
            raise AssertionError(f"{target}: no end after {timeout} s\n{said}")
        time.sleep(0.05)


def _tail(log: Any) -> str:
    log.flush()
    log.seek(0)
    return log.read()[-6000:]


def _main() -> None:
    target, scratch = sys.argv[1:3]
    path, function = target.rsplit(":", 1)
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location("parallel_checks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        result = getattr(module, function)(json.loads((Path(scratch) / "args.json").read_text()))
        (Path(scratch) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: other ranks may be waiting in a collective that can never finish.
        os._exit(1)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
