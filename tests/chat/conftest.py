"""Test modules here import browser and test_web by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from her_nemo.chat.scenes import Scene, miniature_scenes
from her_nemo.chat.session import ChatSession


@pytest.fixture(scope="session")
def scene() -> Scene:
    """Kit Holt hides the mask under the chapel; Pia Penn asks about the drum."""
    return miniature_scenes(1)[0]


@pytest.fixture
def session(scene: Scene) -> ChatSession:
    """Pia Penn has spoken, Kit Holt is next."""
    return ChatSession.begin(scene, "Kit Holt", "s1")
