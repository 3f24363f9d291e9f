"""One process that is a whole Megatron world on one device, and small models for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    from her_nemo.megatron import parallel

    parallel.initialize(seed=3)
    yield
    parallel.destroy()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checks import hugging_face

    return hugging_face(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checks import TINY, hugging_face

    return hugging_face(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.fixture
def steps() -> Callable[..., dict]:
    """Runs continued.py on the CPU or on the GPU and returns what it printed."""

    def run(device: str, *arguments: object) -> dict:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "continued.py"), *map(str, arguments)],
            env=os.environ | hidden | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
