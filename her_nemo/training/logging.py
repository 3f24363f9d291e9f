"""Metrics of a run: TensorBoard for people, JSON lines for programs, written by the main rank alone."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"


class MetricLogger:
    """Writes scalars to `<run>/tensorboard/` and to `<run>/metrics.jsonl`; does nothing on other ranks.

    A resumed run first drops the lines of steps that it is about to take again, so that
    every (step, tag) pair stands in the file once.
    """

    def __init__(self, run_dir: Path, *, enabled: bool, resumed_step: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        self._lines = None
        self.measured: dict[str, tuple[int, float]] = {}  # tag -> (step, value), of the last time; on the main rank
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step] if resumed_step else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._lines = path.open("a")
        self._writer = SummaryWriter(
            run_dir / TENSORBOARD_DIR, purge_step=resumed_step + 1 if resumed_step else None
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` (tag -> scalar) at `step`. A value that is not finite is kept as it is in
        TensorBoard and as null in the JSON lines, which have no spelling for it."""
        if self._writer is None or self._lines is None:
            return
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
            self.measured[tag] = step, float(value)
            written = float(value) if math.isfinite(value) else None
            self._lines.write(json.dumps({"step": step, "tag": tag, "value": written}) + "\n")
        self._lines.flush()

    def text(self, step: int, tag: str, body: str) -> None:
        """Record a text sample, shown by TensorBoard as preformatted."""
        if self._writer is not None:
            self._writer.add_text(tag, "    " + body.replace("\n", "\n    "), step)

    def close(self) -> None:
        if self._writer is not None and self._lines is not None:
            self._writer.close()
            self._lines.close()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Timers:
    """Wall-clock seconds of the parts of a step, on this rank. On CUDA each part waits for the GPU at its end."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def seconds(self, name: str) -> float:
        """Seconds of a part since the last `tags`."""
        return self._seconds[name]

    def tags(self) -> dict[str, float]:
        """`timers/<part>` of everything timed since the last call, which starts anew."""
        found = {f"timers/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return found


def quiet_transformers() -> None:
    """Keep transformers' bars for loading and writing to terminals, as our own are."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every row of a `metrics.jsonl`, oldest first. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows


def series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The same rows as one curve per tag: tag -> [(step, value), ...]."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(path):
        if row["value"] is not None:
            curves.setdefault(row["tag"], []).append((row["step"], row["value"]))
    return curves


def progress(steps: Iterable[int], *, total: int, done: int, title: str, enabled: bool) -> Iterator[int]:
    """`steps` under a bar with rate and time left: on the main rank, and only where a terminal is."""
    bar = tqdm(
        steps,
        total=total,
        initial=done,
        desc=title,
        unit="step",
        dynamic_ncols=True,
        disable=None if enabled else True,
    )
    yield from bar


def sum_metrics(rows: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add up dictionaries of summed scalars (one a micro-batch), key by key, in float64."""
    total: dict[str, torch.Tensor] = {}
    for row in rows:
        for key, value in row.items():
            value = value.detach().double()
            total[key] = total[key] + value if key in total else value
    return total
