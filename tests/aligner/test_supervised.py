"""SFT and the reward model under SupervisedTrainer: our loop's curves, files and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aligner_files import Place, curve, in_processes, steps, summary, supervised

pytestmark = pytest.mark.nemo

Stage = Callable[..., None]
STAGES = {"sft": "sft", "rm": "reward"}
TAGS = {
    "sft": ("train/loss", "val/loss", "train/grad_norm", "train/lr", "layers/speech/loss"),
    "rm": ("train/loss", "val/loss", "train/grad_norm", "train/lr", "train/accuracy", "val/accuracy"),
}


def gap(first: Path, second: Path, tag: str) -> float:
    a, b = np.array(curve(first, tag)), np.array(curve(second, tag))
    assert a.shape == b.shape
    assert steps(first, tag) == steps(second, tag)
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("kind", STAGES)
def test_curves_are_those_of_our_loop(place: Place, stage: Stage, tmp_path: Path, kind: str) -> None:
    """Seven steps over several epochs, two validations and one at the end."""
    native, theirs = tmp_path / "native", tmp_path / "theirs"
    stage(STAGES[kind], *supervised(place, kind, "native", native))
    stage(STAGES[kind], *supervised(place, kind, "nemo_aligner", theirs))
    losses = curve(native, "train/loss")
    assert len(losses) == 7
    assert losses[-1] < losses[0] - 0.05, "the run does not learn, so that equal curves prove little"
    for tag in TAGS[kind]:
        assert gap(native, theirs, tag) < 1e-5, tag
    assert steps(theirs, "val/loss") == [3, 6, 7]
    mine, other = (
        {key: value for key, value in summary(run).items() if key != "seconds"} for run in (native, theirs)
    )
    assert mine.keys() == other.keys()
    assert all(other[key] == pytest.approx(mine[key], abs=1e-5) for key in mine)
    kept = sorted(path.name for path in (theirs / "checkpoints").glob("step_*"))
    assert kept == ["step_00000006", "step_00000007"]


def test_a_run_that_was_cut_goes_on_under_either_backend(place: Place, stage: Stage, tmp_path: Path) -> None:
    """One kind of checkpoint: three steps of our loop, two of NeMo-Aligner's, two of ours. Without clipping."""
    options = {
        "model.optim.sched.name": "constant",
        "trainer.sft.gradient_clip_val": 0.0,
        "trainer.sft.save_interval": 3,
    }
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    stage("sft", *supervised(place, "sft", "native", whole, **options))
    for backend, last in (("native", 3), ("nemo_aligner", 5), ("native", 7)):
        stage("sft", *supervised(place, "sft", backend, mixed, **options, **{"trainer.sft.max_steps": last}))
    for tag in ("train/loss", "train/grad_norm"):
        assert gap(whole, mixed, tag) < 1e-5, tag


def test_the_time_limit_saves_and_stops(place: Place, stage: Stage, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limit = {"exp_manager.max_time_per_run": "00:00:00"}
    stage("sft", *supervised(place, "sft", "nemo_aligner", run, **limit))
    assert steps(run, "train/loss") == [1]
    assert (run / "checkpoints" / "step_00000001" / "manifest.json").is_file()


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_two_processes(place: Place, tmp_path: Path, layout: str) -> None:
    """Tensor and data parallel over gloo, each against our loop at the same layout."""
    cut = ["trainer.devices=2", f"model.tensor_model_parallel_size={2 if layout == 'tp2' else 1}"]
    for backend in ("native", "nemo_aligner"):
        in_processes("sft", [*supervised(place, "sft", backend, tmp_path / backend), *cut])
    for tag in ("train/loss", "val/loss", "train/grad_norm"):
        assert gap(tmp_path / "native", tmp_path / "nemo_aligner", tag) < 1e-5, tag
