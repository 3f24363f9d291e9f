"""`her-nemo evaluate benchmark=coser`: CoSER's given-circumstance acting.

Answers are cached as they come; results.json and scenes.jsonl are written at the end, whole or not at all.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from her_nemo.config.evaluation import CoserConfig
from her_nemo.data.synthesis.pipeline import only_run
from her_nemo.evaluation.coser import roles_of, run_coser
from her_nemo.evaluation.results import RESULTS_FILE, SCENES_FILE
from her_nemo.evaluation.servers import served
from her_nemo.evaluation.summary import summary


def run(cfg: CoserConfig) -> int:
    out = Path(cfg.out)
    with only_run(out), served(roles_of(cfg), cfg.server, out) as (roles, identities):
        results = asyncio.run(run_coser(cfg, roles, identities))
    print(f"{summary(results)}\n-> {out / RESULTS_FILE}, {out / SCENES_FILE}")
    return 0
