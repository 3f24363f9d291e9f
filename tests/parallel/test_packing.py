"""Packed rows give the loss and the gradients of the samples they hold, at every layout; so do weights by kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("packing_checks.py"))
ONE = [{"name": "tp1"}, {"name": "recompute", "recompute": True}]
TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2_sequence", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "dp2"},
    {"name": "dp2_distributed", "distributed": True},
]


def assert_same(processes: int, layouts: list[dict], reference: Path) -> None:
    from packing_checks import plain_torch

    expected = plain_torch(reference)
    # The weights matter more than the tolerances below.
    assert abs(expected["even"]["loss"] - expected["uneven"]["loss"]) > 1e-4
    assert abs(expected["even"]["norm"] - expected["uneven"]["norm"]) > 1e-2
    ranks = run(processes, f"{CHECKS}:packing", {"directory": str(reference), "layouts": layouts})
    for results in ranks:
        assert set(results) == {layout["name"] for layout in layouts}
        for layout, by_weights in results.items():
            for weights, found in by_weights.items():
                where = (layout, weights, found)
                assert abs(found["loss"] - expected[weights]["loss"]) < 1e-5, where
                assert abs(found["packed_loss"] - expected[weights]["loss"]) < 1e-5, where
                assert found["gradients"] < 1e-5, where
                assert found["largest"] > 1e-2, where
                assert abs(found["norm"] - expected[weights]["norm"]) < 1e-4, where
                assert found["by_kind"] < 1e-3, where
                assert found["rows"] < found["samples"], where


def test_one_process(reference: Path) -> None:
    assert_same(1, ONE, reference)


@pytest.mark.parallel
def test_two_processes(reference: Path) -> None:
    assert_same(2, TWO, reference)
