"""A small world and a small random Qwen3 over its tokenizer, for the stages run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Test modules import stage_files by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from stage_files import Place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    from tiny_qwen3 import tiny_model

    from her_nemo.data.miniature_files import WorldSizes, write_world
    from her_nemo.data.tokenise import Tokeniser

    home = tmp_path_factory.mktemp("stages")
    sizes = WorldSizes(
        pretrain=400, sft_train=96, sft_val=16, pairs_train=48, pairs_val=16, prompts_train=48, prompts_test=16
    )
    write_world(home / "world", 0, sizes)
    tokeniser = Tokeniser(home / "world" / "tokenizer")
    tiny_model(
        home / "hf", tokenizer=tokeniser.hf, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )
    return Place(home / "world", home / "hf")


@pytest.fixture(scope="session")
def wide(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The shared world and a model with heads of 32, the smallest that vLLM has on CPU."""
    from tiny_qwen3 import tiny_model

    from her_nemo.data.tokenise import Tokeniser

    home = tmp_path_factory.mktemp("wide")
    tiny_model(
        home, tokenizer=Tokeniser(place.model).hf, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Place(place.world, home)


@pytest.fixture(scope="session")
def stage() -> Callable[..., None]:
    """Runs `python -m her_nemo STAGE OVERRIDES`; fails the test with what it said if it fails."""

    def run(name: str, *overrides: str, timeout: float = 300) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "her_nemo", name, *overrides],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout, check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run
