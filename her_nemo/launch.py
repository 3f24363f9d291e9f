"""Start one process per device on this machine, as torchrun would, and end with one clear message.

Rank 0 keeps the terminal; what the others print is prefixed with their rank. A user error in any rank is shown
once, without the tracebacks its death causes in the others. Several machines: use torchrun or Slurm.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

# Set in a launched process: the directory where a rank leaves the text of its user error.
MAILBOX = "HER_NEMO_ERROR_DIR"
POLL_SECONDS = 0.05
# After the first failure, how long the others may take to end by themselves, and then to obey SIGTERM.
GRACE_SECONDS = 3.0
TERM_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


def run(
    arguments: Sequence[str],
    processes: int,
    environment: Mapping[str, str] | None = None,
    module: str = "her_nemo",
) -> int:
    """Run `python -m <module> <arguments>` in `processes` processes; the exit code of the first that failed.

    `environment` is added to this process's. SIGINT and SIGTERM are passed on and the processes waited for.
    """
    with tempfile.TemporaryDirectory(prefix="her_nemo_") as folder:
        mailbox = Path(folder)
        shared = dict(os.environ) | dict(environment or {}) | _rendezvous(processes) | {MAILBOX: folder}
        if processes > 1:
            shared.setdefault("OMP_NUM_THREADS", "1")
        children: list[subprocess.Popen[str]] = []
        with _forwarded_signals(children) as received:
            pumps = []
            try:
                for rank in range(processes):
                    children.append(_start([module, *arguments], rank, shared))
                    if rank > 0:
                        pumps.append(_pump(children[-1], rank))
                code = _wait(children)
            finally:
                _end(children)
            for pump in pumps:
                pump.join(timeout=TERM_SECONDS)
        return _close(children, mailbox, code, received)


def is_launched() -> bool:
    """Whether this process was started by `run`, which has checked the configuration already."""
    return MAILBOX in os.environ


def leave_message(text: str) -> bool:
    """In a launched process: leave the text of a user error for the launcher. False when there is no launcher."""
    folder = os.environ.get(MAILBOX)
    if folder is None:
        return False
    (Path(folder) / f"rank_{int(os.environ['RANK']):05d}").write_text(text, encoding="utf-8")
    return True


def another_rank_explained() -> bool:
    """Whether some rank has left a user error: what fails here now is then only its consequence."""
    folder = os.environ.get(MAILBOX)
    return folder is not None and any(Path(folder).iterdir())


def die_with_launcher() -> None:
    """In a launched process on Linux: be killed when the launcher is, so that none is left behind."""
    if os.environ.get(MAILBOX) is not None and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _rendezvous(processes: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # All on one machine: loopback works where the host's own name does not resolve.
    if "lo" in {name for _, name in socket.if_nameindex()}:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables


def _start(
    module_and_arguments: Sequence[str], rank: int, shared: Mapping[str, str]
) -> subprocess.Popen[str]:
    stream = None if rank == 0 else subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *module_and_arguments],
        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=None if rank == 0 else subprocess.STDOUT,
        text=True,
        errors="replace",
        # Out of the terminal's process group: Ctrl-C reaches each of them once, through us.
        start_new_session=True,
    )


def _pump(child: subprocess.Popen[str], rank: int) -> threading.Thread:
    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stderr.write(f"[rank {rank}] {line}")

    thread = threading.Thread(target=copy, name=f"output of rank {rank}", daemon=True)
    thread.start()
    return thread


def _wait(children: Sequence[subprocess.Popen[str]]) -> int:
    """Wait until all have ended well, or one has failed and the others had their grace. The first failure's code."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(POLL_SECONDS)
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_SECONDS)


def _end(children: Sequence[subprocess.Popen[str]]) -> None:
    """End whatever still runs: SIGTERM, then SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        running = [child for child in children if child.poll() is None]
        for child in running:
            child.send_signal(how)
        deadline = time.monotonic() + TERM_SECONDS
        for child in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _forwarded_signals(children: Sequence[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """While open, SIGINT and SIGTERM go to the children, who save and stop. Yields the signals received."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _close(children: Sequence[subprocess.Popen[str]], mailbox: Path, code: int, received: list[int]) -> int:
    """Say once why it failed, and turn the outcome into an exit code."""
    messages = {
        file.read_text(encoding="utf-8"): file.name for file in sorted(mailbox.iterdir(), reverse=True)
    }
    if messages:
        for text, name in reversed(messages.items()):
            rank = int(name.removeprefix("rank_"))
            print(f"her-nemo: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)
        return 2
    if code == 0 or received:
        return code if code >= 0 else 128 - code
    failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.returncode == code]
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    print(f"her-nemo: rank {failed[0][0]} of {len(children)} {how}; the others were ended", file=sys.stderr)
    return code if code > 0 else 128 - code
