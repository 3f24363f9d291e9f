"""The functions of the GPU tests run on this machine too, smaller: a GPU is not where their slips should show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checks
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real ones run where CUDA is")


def test_parity(tiny: Path, world: None) -> None:
    exact = checks.parity(tiny, checks.with_layers("32", transformer_engine=None))
    assert exact["ours"] < 1e-6
    assert exact["top1_agreement"] == 1.0
    half = checks.parity(tiny, checks.with_layers("bf16", transformer_engine=False))
    assert 0 < half["ours"] < 2 * half["theirs"]


@pytest.mark.parametrize("packed", [False, True])
def test_training(packed: bool, tiny: Path, world: None) -> None:
    found = checks.trained(tiny, checks.with_layers("bf16-mixed", transformer_engine=None), 12, rows=2, length=32,
                           packed=packed)  # fmt: skip
    assert found[-1] < 0.8 * found[0]


@pytest.mark.slow
def test_a_run_in_two_processes_is_the_run_in_one(tiny: Path, tmp_path: Path, steps: Callable[..., dict]) -> None:
    whole = steps("cpu", tiny, tmp_path / "whole", 4)
    first = steps("cpu", tiny, tmp_path / "first", 2)
    second = steps("cpu", tiny, tmp_path / "second", 2, tmp_path / "first")
    assert whole["device"] == "cpu"
    assert first["losses"] + second["losses"] == whole["losses"]
