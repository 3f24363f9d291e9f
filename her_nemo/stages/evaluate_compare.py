"""`her-nemo evaluate compare RUN_A RUN_B ...`: one page that shows runs of a benchmark side by side."""

from __future__ import annotations

from pathlib import Path

from her_nemo.config.roleplay_bench import CompareConfig
from her_nemo.evaluation.compare import read_runs, table, with_limit, write_comparison


def run(cfg: CompareConfig) -> int:
    runs = with_limit(read_runs(cfg.runs, cfg.labels), cfg.max_failure_share)
    bootstrap = {"resamples": cfg.resamples, "level": cfg.level, "seed": cfg.seed}
    groups = write_comparison(runs, Path(cfg.out), max_scenes=cfg.max_scenes, **bootstrap)
    print(f"{table(runs, groups)}\n-> {cfg.out}")
    return 0
