"""LoRA at every layout: one curve, one merged model, resumed bit for bit, loaded at any other layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("lora_checks.py"))
TOLERANCE = 1e-4
ONE = [
    {"name": "tp1"},
    {"name": "recompute", "recompute": True},
    {"name": "distributed", "distributed": True},
]
TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2_sequence", "tensor": 2, "sequence": True},
    {"name": "tp2_sequence_recompute", "tensor": 2, "sequence": True, "recompute": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "pp2_recompute", "pipeline": 2, "recompute": True},
    {"name": "dp2"},
    {"name": "dp2_distributed", "distributed": True},
]
FOUR = [
    {"name": "tp2_pp2_sequence", "tensor": 2, "pipeline": 2, "sequence": True},
    {"name": "tp2_dp2_distributed", "tensor": 2, "distributed": True},
]


@pytest.mark.parallel
def test_layouts_agree(reference: Path, tmp_path: Path) -> None:
    args = {"directory": str(reference), "out": str(tmp_path)}
    (alone,) = run(1, f"{CHECKS}:layouts", {**args, "layouts": ONE, "write": True}, timeout=1800)
    wanted = alone["tp1"]
    assert wanted["learned"] > 1e-2
    check(ONE, alone, wanted)
    for processes, cases in ((2, TWO), (4, FOUR)):
        for results in run(processes, f"{CHECKS}:layouts", {**args, "layouts": cases, "write": False}, timeout=3600):
            check(cases, results, wanted)


def check(cases: list[dict], results: dict, wanted: dict) -> None:
    """Every number of every layout; the initial model, the base and the resumed run to the bit."""
    for case in cases:
        found, name = results[case["name"]], case["name"]
        assert found["initial"] == 0.0, name
        assert found["base_moved"] == 0.0, name
        assert found["off"] == 0.0, name
        assert found["resumed"], name
        assert found["replicas_differ"] == 0.0, name
        for part in ("losses", "norms"):
            gaps = [abs(a - b) for a, b in zip(found[part], wanted[part], strict=True)]
            assert max(gaps) < TOLERANCE, (name, part, gaps)
        later = wanted["losses"][2:] if found["elsewhere"] else []
        assert all(abs(a - b) < TOLERANCE for a, b in zip(found["elsewhere"], later, strict=True)), name
        assert found["merged"] < TOLERANCE, name
        assert found["merged_log_probs"] < TOLERANCE, name
