"""What all tests share: an offline, single-threaded environment, and running the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch or transformers are imported by any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # test modules import tiny_qwen3 by name
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

CommandLine = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no CUDA: they have nothing to run on."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public sample data that the project does not contain; tests that use it are skipped where it is absent."""
    given = os.environ.get("HER_NEMO_SHARED_DATA")
    places = [Path(given)] if given else [ROOT.parent / "shared" / "data", Path("/work/shared/data")]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"no shared sample data in {' or '.join(map(str, places))}")


@pytest.fixture
def her_nemo(tmp_path: Path) -> CommandLine:
    """Runs `python -m her_nemo ARGUMENTS` in a scratch directory and returns what it did."""

    def run(*arguments: str, timeout: float = 120, cwd: Path | None = None, **variables: str):
        environment = {key: value for key, value in os.environ.items() if key not in RENDEZVOUS}
        environment |= {"PYTHONPATH": str(ROOT), **variables}
        return subprocess.run(
            [sys.executable, "-m", "her_nemo", *arguments],
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
