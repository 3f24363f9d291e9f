"""`her-nemo evaluate benchmark=reward_model`: how often a scalar reward model prefers what people preferred."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.data.sources import read_rows
from her_nemo.evaluation.preference_report import table
from her_nemo.evaluation.results import RESULTS_FILE, write_results
from her_nemo.evaluation.reward_bench import run_reward_bench, score_pairs

REPORT_FILE = "report.json"


def run(cfg: RewardBenchConfig) -> int:
    out = Path(cfg.out)
    rows, _ = read_rows(cfg.pairs, "pairs")
    rows = rows if cfg.num_pairs < 0 else rows[: cfg.num_pairs]
    scored = score_pairs(
        cfg.model,
        rows,
        max_length=cfg.max_length,
        micro_batch_size=cfg.micro_batch_size,
        dtype=cfg.dtype,
    )
    scores = list(tqdm(scored, total=len(rows), desc=cfg.name, unit="pair", disable=None))
    report, results, scenes = run_reward_bench(cfg, rows, scores)
    write_results(out, results, scenes)
    (out / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    print(f"{table(report)}\n-> {out / REPORT_FILE}, {out / RESULTS_FILE}")
    return 0
