"""`her-nemo evaluate benchmark=reward_model`: how often a reward model prefers what people preferred.

Scalar models are scored here; of a judge that writes verdicts, those of `her-nemo judge` are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from her_nemo.config.errors import UserError
from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.data.sources import read_rows
from her_nemo.evaluation.preference_report import PairOutcome, table
from her_nemo.evaluation.results import RESULTS_FILE, write_results
from her_nemo.evaluation.reward_bench import outcomes_of, outcomes_of_verdicts, run_reward_bench

REPORT_FILE = "report.json"


def run(cfg: RewardBenchConfig) -> int:
    out = Path(cfg.out)
    rows, pairs = _verdicts(cfg) if cfg.verdicts is not None else _scored(cfg)
    report, results, scenes = run_reward_bench(cfg, rows, pairs)
    write_results(out, results, scenes)
    (out / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    print(f"{table(report)}\n-> {out / REPORT_FILE}, {out / RESULTS_FILE}")
    return 0


def _scored(cfg: RewardBenchConfig) -> tuple[Sequence[Mapping[str, Any]], list[PairOutcome]]:
    """The pairs, and what the model makes of each."""
    from her_nemo.evaluation.reward_scores import score_pairs

    assert cfg.model is not None  # planning/roleplay_bench_checks.py holds it
    assert cfg.pairs is not None
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
    return rows, outcomes_of(cfg, rows, scores)


def _verdicts(cfg: RewardBenchConfig) -> tuple[Sequence[Mapping[str, Any]], list[PairOutcome]]:
    """The rows that `her-nemo judge` wrote, and the outcome of each."""
    assert cfg.verdicts is not None
    try:
        with Path(cfg.verdicts).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        rows = rows if cfg.num_pairs < 0 else rows[: cfg.num_pairs]
        pairs = outcomes_of_verdicts(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"verdicts={cfg.verdicts}: no verdicts as her-nemo judge writes them ({type(error).__name__}: {error}); "
            "give its samples.jsonl"
        ) from error
    if not pairs:
        raise UserError(f"verdicts={cfg.verdicts}: there are none in it")
    return rows, pairs
