"""Fixtures of the tests that start several processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# The test processes import these modules by name; so do the tests.
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny Hugging Face models and what Hugging Face and torch compute from them."""
    import qwen3_reference

    directory = tmp_path_factory.mktemp("reference")
    qwen3_reference.make(directory)
    return directory
