"""One process that is a whole Megatron world, for the tests of this folder, and tiny models to play with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from her_nemo.megatron import parallel, qwen3, weights

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny import TINY


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[None]:
    """torch.distributed and megatron-core's groups with one member, gone again before other folders' tests."""
    parallel.initialize(seed=3)
    yield
    parallel.destroy()


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory, world: None) -> Path:
    """A Hugging Face directory with a tiny tied Qwen3."""
    directory = tmp_path_factory.mktemp("tiny")
    weights.save_hf(qwen3.build(TINY), directory)
    return directory
