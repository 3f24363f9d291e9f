"""A scripted endpoint, and the stage run inside the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Test modules import the helpers beside them by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from scripted_endpoint import QUICK, ScriptedEndpoint, serve

from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.stages import data_synthesise

__all__ = ["serve", "settings", "synthesise"]


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., SynthesiseConfig]:
    """A configuration for a server and a source; limits.* and other sections as dictionaries."""

    def make(server: ScriptedEndpoint | str, source: Path, stage: str = "role_thinking", **keys: Any):
        values = {
            "name": "test",
            "stage": stage,
            "source": str(source),
            "out": str(tmp_path / "out"),
            "endpoint": server if isinstance(server, str) else server.url,
            "model": "scripted",
            **keys,
            "limits": QUICK | keys.get("limits", {}),
        }
        return SynthesiseConfig(**values)

    return make


@pytest.fixture
def synthesise() -> Callable[[SynthesiseConfig], int]:
    return data_synthesise.run
