"""Stand-ins for srun, squeue, scontrol and scancel that start, list and signal real processes on this machine.

For machines without Slurm; test_real_slurm.py is the same with Slurm itself. `install(folder)` writes the commands.
srun starts its tasks with Slurm's variables and labels their output; squeue lists the steps that run; scancel signals a
step's tasks; `scontrol requeue` is written down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

STEPS, CALLS = "steps", "calls"


def install(folder: Path) -> Path:
    """The commands in folder/bin; what they note lies in `folder`."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    (folder / STEPS).mkdir()
    for name in ("srun", "squeue", "scontrol", "scancel"):
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
    step = folder / STEPS / f"{os.environ['SLURM_JOB_ID']}.{os.getpid()}"
    pids = " ".join(str(task.pid) for task in tasks)
    step.write_text(f"{options.get('job-name', words[0])}\n{pids}\n")
    pumps = [threading.Thread(target=pump, args=(task, rank, output)) for rank, task in enumerate(tasks)]
    for thread in pumps:
        thread.start()
    codes = [task.wait() for task in tasks]
    for thread in pumps:
        thread.join()
    step.unlink()
    return max(code if code >= 0 else 128 - code for code in codes)


def pump(task: subprocess.Popen[str], rank: int, output) -> None:
    for line in task.stdout:
        print(f"{rank}: {line}" if output else line, end="", file=output or sys.stdout, flush=True)


def squeue(folder: Path, words: list[str]) -> int:
    assert "--steps" in words, words
    assert "--format=%i %j" in words, words
    for step in sorted((folder / STEPS).iterdir()):
        print(step.name, step.read_text().splitlines()[0])
    return 0


def scancel(folder: Path, words: list[str]) -> int:
    how, step = words
    _, pids = (folder / STEPS / step).read_text().splitlines()
    for pid in pids.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.Signals[f"SIG{how.removeprefix('--signal=')}"])
    return 0


def scontrol(folder: Path, words: list[str]) -> int:
    match words[:2]:
        case ["show", "hostnames"]:
            print("here")
        case ["show", "node"]:
            print(f"NodeName={words[-1]} CPUTot=2 NodeAddr=127.0.0.1 NodeHostName=here")
        case ["show", "job"]:
            print(f"JobId={words[-1]} JobName=her-nemo JobState=RUNNING Reason=None")
        case _:
            with (folder / CALLS).open("a") as calls:
                calls.write(" ".join(words) + "\n")
    return 0


if __name__ == "__main__":
    place, command, *rest = sys.argv[1:]
    commands = {"srun": srun, "squeue": squeue, "scontrol": scontrol, "scancel": scancel}
    sys.exit(commands[command](Path(place), rest))
