"""What a run writes of its figures."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from her_nemo.training.logging import MetricLogger, Timers, read_metrics, series, sum_metrics


def test_both_files_hold_the_same_figures(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, enabled=True) as metrics:
        for step in (1, 2):
            metrics.log(step, {"train/loss": 1.0 / step, "train/lr": 0.5})
        metrics.log(3, {"train/loss": math.nan})
    assert series(tmp_path / "metrics.jsonl") == {
        "train/loss": [(1, 1.0), (2, 0.5)],
        "train/lr": [(1, 0.5), (2, 0.5)],
    }
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "tag": "train/loss", "value": None}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/lr")] == [(1, 0.5), (2, 0.5)]
    assert math.isnan(events.Scalars("train/loss")[-1].value)


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    with MetricLogger(tmp_path, enabled=True) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ta')  # cut short by a kill
    with MetricLogger(tmp_path, enabled=True, resumed_step=2) as metrics:
        metrics.log(3, {"train/loss": 30.0})
    assert series(tmp_path / "metrics.jsonl")["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricLogger(tmp_path / "run", enabled=False) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_timers_add_up_and_start_anew() -> None:
    timers = Timers()
    for _ in range(2):
        with timers("generate"):
            pass
    with timers("step"):
        pass
    assert timers.seconds("generate") > 0
    assert timers.tags().keys() == {"timers/generate", "timers/step"}
    assert timers.tags() == {}


def test_sums_are_taken_in_float64() -> None:
    rows = [{"loss": torch.tensor(2.0**24)}, {"loss": torch.tensor(1.0)}, {"count": torch.tensor(3)}]
    total = sum_metrics(rows)
    assert total["loss"].item() == 2.0**24 + 1
    assert total["count"].item() == 3
