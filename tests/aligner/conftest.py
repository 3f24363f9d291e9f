"""Tests of the room that knows NeMo-Aligner: skipped where it is not installed, a small world where it is."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Test modules import aligner_files by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from aligner_files import Place, make_place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked nemo have nothing to run on without NeMo-Aligner, which has an environment of its own."""
    if importlib.util.find_spec("nemo_aligner") is None:
        for item in items:
            if item.get_closest_marker("nemo"):
                item.add_marker(pytest.mark.skip(reason="needs NeMo-Aligner: make test-nemo"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("aligner"))


@pytest.fixture(scope="session")
def stage() -> Callable[..., None]:
    """Runs a stage of the command line in this process: importing NeMo takes longer than the runs themselves."""
    from her_nemo import cli

    def run(name: str, *overrides: str) -> None:
        # A run notes signals and goes on to the end of its step; the tests are to be stoppable.
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            assert cli.main([name, *overrides]) == 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run
