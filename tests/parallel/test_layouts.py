"""Logits, export, training and values agree with Hugging Face and torch's AdamW at every parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run

CHECKS = str(Path(__file__).with_name("qwen3_checks.py"))
TOLERANCE = 1e-4

TWO = [
    {"name": "tp2", "tensor": 2},
    {"name": "tp2_sequence", "tensor": 2, "sequence": True},
    {"name": "pp2", "pipeline": 2},
    {"name": "dp2", "divisible": 128},
    {"name": "dp2_distributed", "distributed": True},
]
FOUR = [
    {"name": "tp2_pp2", "tensor": 2, "pipeline": 2},
    {"name": "tp2_pp2_sequence", "tensor": 2, "pipeline": 2, "sequence": True},
    {"name": "tp2_dp2_distributed", "tensor": 2, "distributed": True},
    {"name": "pp2_dp2_distributed", "pipeline": 2, "distributed": True},
]


def assert_agrees(processes: int, layouts: list[dict], reference: Path, models: list[str] | None = None) -> None:
    """Every check of every layout on every rank is within the tolerance."""
    args = {"directory": str(reference), "layouts": layouts, "models": models or ["tied", "untied", "scalar"]}
    ranks = run(processes, f"{CHECKS}:layouts", args)
    worse = [
        f"{layout} rank {rank} {check}: {gap}"
        for rank, results in enumerate(ranks)
        for layout, checks in results.items()
        for check, gap in checks.items()
        if not gap <= TOLERANCE
    ]
    assert not worse, "\n".join(worse)
    assert all(len(results[layout["name"]]) >= 5 for results in ranks for layout in layouts)


def test_one_process(reference: Path) -> None:
    assert_agrees(1, [{"name": "tp1"}, {"name": "recompute", "recompute": True}], reference)


def test_tensor_by_pipeline(reference: Path) -> None:
    assert_agrees(4, [{"name": "tp2_pp2", "tensor": 2, "pipeline": 2}], reference, models=["tied"])


# Starting a process takes seconds, so one launch visits all layouts of its size; the report names each.
@pytest.mark.parallel
def test_two_processes(reference: Path) -> None:
    assert_agrees(2, TWO, reference)


@pytest.mark.parallel
def test_four_processes(reference: Path) -> None:
    assert_agrees(4, FOUR, reference)


@pytest.mark.parallel
def test_ranks_share_a_group(reference: Path) -> None:
    """Fewer query groups than tensor-parallel ranks: both compute with the one key and value."""
    assert_agrees(2, TWO[:2], reference, models=["one_group"])


@pytest.mark.parallel
def test_vocabulary_is_not_gathered() -> None:
    for rank in run(2, f"{CHECKS}:vocabulary", {"tensor": 2}):
        assert rank["log_probs"] < 1e-5
        assert rank["entropy"] < 1e-5
        assert rank["grad"] < 1e-5
        assert rank["grad_padding"] == 0.0


@pytest.mark.parallel
def test_a_loss_that_is_not_finite_on_one_rank_stops_all() -> None:
    first, second = run(2, f"{CHECKS}:not_finite")
    assert "step 7" in first["raised"]
    assert "another rank" in first["raised"]
    assert "nan" in second["raised"]


@pytest.mark.parallel
def test_what_the_main_rank_does_reaches_all() -> None:
    assert run(2, f"{CHECKS}:on_main") == [{"found": 7, "raised": "no such file"}] * 2


@pytest.mark.parallel
def test_bf16_trains_at_every_layout(reference: Path) -> None:
    layouts = [{"name": "tp2", "tensor": 2}, {"name": "pp2", "pipeline": 2}, {"name": "dist", "distributed": True}]
    for rank in run(2, f"{CHECKS}:bf16", {"directory": str(reference), "layouts": layouts}):
        for name, found in rank.items():
            assert found["dtype"] == "torch.bfloat16", name
            # bf16 keeps eight bits: the loss near 4.8 moves by a few hundredths.
            assert found["losses"] < 0.15, (name, found)


@pytest.mark.parallel
def test_a_failing_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of .*\n(.*\n)*.*ZeroDivisionError"):
        run(2, f"{CHECKS}:fails_on_rank_one", timeout=60)
