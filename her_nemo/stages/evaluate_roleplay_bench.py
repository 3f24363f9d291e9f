"""`her-nemo evaluate benchmark=roleplay_bench`: MiniMax's Role-Play Bench.

Answers are cached as they come; results.json and scenes.jsonl are written at the end, whole or not at all.
"""

from __future__ import annotations

from pathlib import Path

from her_nemo.config.roleplay_bench import RoleplayBenchConfig
from her_nemo.data.synthesis.pipeline import only_run
from her_nemo.evaluation.results import RESULTS_FILE, SCENES_FILE, write_results
from her_nemo.evaluation.roleplay_bench import roles_of, run_bench
from her_nemo.evaluation.servers import served
from her_nemo.evaluation.summary import summary


def run(cfg: RoleplayBenchConfig) -> int:
    out = Path(cfg.out)
    with only_run(out), served(roles_of(cfg), cfg.server, out) as (roles, identities):
        results, scenes = run_bench(cfg, roles, identities)
        write_results(out, results, scenes)
    print(f"{summary(results)}\n-> {out / RESULTS_FILE}, {out / SCENES_FILE}")
    return 0
