"""A signal or a deadline becomes one answer at the end of a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from her_nemo.training.signals import GracefulStop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers that were there before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_a_second_one_means_now(number: signal.Signals) -> None:
    stop = GracefulStop()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
    with pytest.raises(KeyboardInterrupt, match="second"):
        os.kill(os.getpid(), number)


def test_a_deadline_that_has_passed() -> None:
    assert GracefulStop(max_seconds=0.0).requested()
    assert not GracefulStop(max_seconds=3600.0).requested()
