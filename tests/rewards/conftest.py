"""Test modules here import judges and scripted_endpoint by name, and run in a world of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "data" / "synthesis")]


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    from her_nemo.megatron import parallel

    parallel.initialize()
    yield
    parallel.destroy()
