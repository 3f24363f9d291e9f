"""Stand-ins for srun, scontrol and scancel that start, count and signal real processes on this machine.

`install(folder)` writes the three commands there. srun starts its tasks with Slurm's variables and labels their output;
scancel sends a signal to the tasks that srun has noted; `scontrol requeue` is written down.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

TASKS, CALLS = "tasks", "calls"


def install(folder: Path) -> Path:
    """The commands in folder/bin; what they note lies in `folder`."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    for name in ("srun", "scontrol", "scancel"):
        command = binaries / name
        command.write_text(
            f'#!/usr/bin/env bash\nexec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"\n'
        )
        command.chmod(0o755)
    return binaries


def srun(folder: Path, words: list[str]) -> int:
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).removeprefix("--").partition("=")
        options[name] = value
    count = int(options.get("ntasks") or os.environ.get("SLURM_NTASKS", "1"))
    output = open(options["output"], "a") if "output" in options else None  # noqa: SIM115
    tasks = []
    for rank in range(count):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(count)}
        tasks.append(
            subprocess.Popen(
                words,
                env={**os.environ, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    (folder / TASKS).write_text(" ".join(str(task.pid) for task in tasks))
    pumps = [threading.Thread(target=pump, args=(task, rank, output)) for rank, task in enumerate(tasks)]
    for thread in pumps:
        thread.start()
    codes = [task.wait() for task in tasks]
    for thread in pumps:
        thread.join()
    return max(codes, key=abs)


def pump(task: subprocess.Popen[str], rank: int, output) -> None:
    for line in task.stdout:
        print(f"{rank}: {line}" if output else line, end="", file=output or sys.stdout, flush=True)


def scancel(folder: Path, words: list[str]) -> int:
    assert words[0] == "--signal=TERM", words
    for pid in (folder / TASKS).read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


def scontrol(folder: Path, words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.2")
    else:
        with (folder / CALLS).open("a") as calls:
            calls.write(" ".join(words) + "\n")
    return 0


if __name__ == "__main__":
    place, command, *rest = sys.argv[1:]
    sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel}[command](Path(place), rest))
