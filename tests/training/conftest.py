"""One process that is a whole world: checkpoints and signals are collective."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from her_nemo.megatron import parallel


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    parallel.initialize(seed=0)
    yield
    parallel.destroy()
