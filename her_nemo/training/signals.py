"""When to stop early: a signal from the scheduler, or the time that one job may take."""

from __future__ import annotations

import signal
import time
from types import FrameType

from her_nemo.megatron import parallel


class GracefulStop:
    """Turns SIGTERM and SIGINT, and the job's time limit, into one answer that all ranks agree on.

    A Slurm job is told to end by a signal that may reach ranks at different steps; a rank that
    left its loop alone would leave the others waiting in a collective. So each rank only notes
    the signal, and `requested()` (a collective, called once a step) says yes everywhere at once.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self._seen: str | None = None
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._seen is not None:
            # A second signal means now: the loop did not come round in the sender's patience.
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self._seen = signal.Signals(number).name

    def requested(self) -> bool:
        """True on every rank as soon as any rank has a reason to stop. Collective."""
        late = self._deadline is not None and time.monotonic() > self._deadline
        return parallel.any_rank(self._seen is not None or late)
