"""Prompts computed once for all replies to them: the same outputs, gradients and replies, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("sharing_checks.py"))
TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2_sequence", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "dp2_distributed", "distributed": True},
]


def assert_same(processes: int, layouts: list[dict], reference: Path) -> None:
    for results in run(processes, f"{CHECKS}:sharing", {"directory": str(reference), "layouts": layouts}):
        assert set(results) == {layout["name"] for layout in layouts}
        for layout, found in results.items():
            assert {"tied.log_probs_BT", "untied.entropy_BT", "scalar.values_BS", "tied.gradients"} <= set(found)
            for check, gap in found.items():
                # Gradients here are up to about 1; the inverse of the largest says that they are not all small.
                limit = 100.0 if check.endswith("least_gradient") else 1e-4
                assert gap < limit, (layout, check, gap)


def test_one_process(reference: Path) -> None:
    assert_same(1, [{"name": "tp1"}, {"name": "recompute", "recompute": True}], reference)


@pytest.mark.parallel
def test_two_processes(reference: Path) -> None:
    assert_same(2, TWO, reference)
