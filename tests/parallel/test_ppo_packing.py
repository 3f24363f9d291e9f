"""Packed replies give the log-probs, values, losses and gradients that rows of one length give, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("ppo_packing_checks.py"))
TWO = [
    {"name": "tp2", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "dp2", "distributed": True},
]


def assert_same(processes: int, layouts: list[dict], reference: Path) -> None:
    for results in run(processes, f"{CHECKS}:compare", {"directory": str(reference), "layouts": layouts}):
        assert set(results) == {layout["name"] for layout in layouts}
        for layout, found in results.items():
            for name in ("old_log_probs_BT", "ref_log_probs_BT", "entropy_BT", "values_BT", "scores"):
                assert found.pop(name) < 1e-4, (layout, name)
            # 64 tokens are two padded rows, or as many replies as have them together.
            assert found.pop("bins") < found.pop("rows"), layout
            assert len(found) == 5
            for name, gaps in found.items():
                assert gaps["gradients"] < 1e-5 * max(1.0, gaps["largest"]), (layout, name, gaps)
                assert gaps["largest"] > 1e-3, (layout, name, gaps)
                assert gaps["sums"] < 1e-3, (layout, name, gaps)


def test_one_process(reference: Path) -> None:
    assert_same(1, [{"name": "tp1"}], reference)


@pytest.mark.parallel
def test_two_processes(reference: Path) -> None:
    assert_same(2, TWO, reference)


@pytest.mark.parametrize("lengths", [[3, 5, 2], []])
def test_unpacking_keeps_values_and_gradients(lengths: list[int]) -> None:
    import torch

    from her_nemo.training.packed import unpack

    said = torch.arange(12.0).requires_grad_()
    found = unpack(said[None] * 1.0, lengths, 6)
    wanted = [[0, 1, 2, 0, 0, 0], [3, 4, 5, 6, 7, 0], [8, 9, 0, 0, 0, 0]][: len(lengths)]
    assert found.tolist() == wanted
    assert found.shape == (len(lengths), 6)
    (found.sum() * 2.0).backward()
    assert said.grad.tolist() == ([2.0] * 10 + [0.0] * 2 if lengths else [0.0] * 12)
