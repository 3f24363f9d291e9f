"""Keeps one server process and all it starts from outliving whoever asked for it.

`python -m her_nemo.rollout.server_guard COMMAND...` runs COMMAND in a session of its own and ends that whole
session when COMMAND ends, on SIGTERM, or when its own standard input closes. The last happens however the
starter dies, SIGKILL included, since it holds the other end of the pipe.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.2
TERM_SECONDS = 4.0


def guard(command: Sequence[str]) -> int:
    """Run `command` until it ends or the guard is told to; its exit code."""
    told = False

    def note(number: int, frame: object) -> None:
        del number, frame
        nonlocal told
        told = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None and not told:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
        end(child)
    finally:
        # What the server had started itself, as vLLM's engine core, is in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def end(child: subprocess.Popen[bytes]) -> None:
    """Ask, wait a little, insist."""
    if child.poll() is not None:
        return
    child.terminate()
    deadline = time.monotonic() + TERM_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if child.poll() is None:
        child.kill()


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
