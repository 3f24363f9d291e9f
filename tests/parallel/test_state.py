"""Checkpoints continue bit for bit at their own layout, and load at every other."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("qwen3_checks.py"))

SAVED = [
    {"name": "tp2", "tensor": 2, "model": "tied"},
    {"name": "tp2_padded", "tensor": 2, "model": "untied", "divisible": 128},
    {"name": "dp2_distributed", "distributed": True, "model": "tied"},
    {"name": "pp2_scalar", "pipeline": 2, "model": "scalar"},
    {"name": "pp2_bf16", "pipeline": 2, "model": "tied", "dtype": "bf16-mixed"},
]
LOADED = [
    {**SAVED[0], "name": "tp2 again", "from": "tp2"},
    {**SAVED[2], "name": "distributed again", "from": "dp2_distributed"},
    {**SAVED[3], "name": "scalar again", "from": "pp2_scalar"},
    {**SAVED[4], "name": "bf16 again", "from": "pp2_bf16"},
    {"name": "tp2 -> pp2", "from": "tp2", "pipeline": 2, "model": "tied"},
    {"name": "padding 256 -> 0", "from": "tp2_padded", "pipeline": 2, "model": "untied", "divisible": 1},
    {"name": "distributed -> tp2", "from": "dp2_distributed", "tensor": 2, "distributed": True, "model": "tied"},
    {"name": "distributed -> pp2", "from": "dp2_distributed", "pipeline": 2, "distributed": True, "model": "tied"},
    {"name": "scalar pp2 -> tp2", "from": "pp2_scalar", "tensor": 2, "sequence": True, "model": "scalar"},
]


@pytest.mark.parallel
def test_resume_is_exact_and_layouts_interchange(reference: Path, tmp_path: Path) -> None:
    common = {"directory": str(reference), "out": str(tmp_path)}
    saved = run(2, f"{CHECKS}:save_state", {**common, "cases": SAVED})
    loaded = run(2, f"{CHECKS}:load_state", {**common, "cases": LOADED})
    alone = [{"name": "tp2 -> 1", "from": "tp2", "model": "tied"}]
    one = run(1, f"{CHECKS}:load_state", {**common, "cases": alone})
    for rank, results in enumerate(loaded):
        for case in LOADED:
            found, wanted = results[case["name"]], saved[rank][case["from"]]
            assert found["extra"] == {"step": 2, "note": case["from"]}
            assert found["lr"] == wanted["lr"]
            if case["name"].endswith("again"):
                assert found["after"] == wanted["after"], case["name"]
                assert found["drawn"] == wanted["drawn"], case["name"]
            else:
                assert_close(found["after"], wanted["after"], case["name"])
    assert_close(one[0]["tp2 -> 1"]["after"], saved[0]["tp2"]["after"], "one process")


def assert_close(found: list, wanted: list, name: str) -> None:
    """Losses and gradient norms of the steps after the load agree within rounding."""
    gaps = [abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(gaps) < 1e-4, (name, gaps)
