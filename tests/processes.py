"""Which processes a test started, and which of them still run."""

from __future__ import annotations

import subprocess
from pathlib import Path


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    found = {pid}
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    while new := {child for child, parent in pairs if parent in found} - found:
        found |= new
    return found


def status(pid: int) -> str:
    """/proc's text about it; of one that is gone, a zombie's."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "\nState:\tZ"


def running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    return "\nState:\tZ" not in status(pid)
