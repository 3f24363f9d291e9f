"""Where the shared files of the stage tests lie, and reading what a run wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where the shared files of the stage tests lie."""

    world: Path
    model: Path


def curve(run_dir: Path, tag: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["tag"] == tag]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())
