"""`her-nemo data synthesise`: thoughts, plans and settings written back into conversations by a language model.

Answers are cached as they come, so the same command goes on where a killed run stopped; results are written at
the end, whole or not at all.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from her_nemo.config.synthesis import SynthesiseConfig
from her_nemo.data.synthesis import judge_transcripts, pipeline, principles
from her_nemo.data.synthesis.asker import Asker
from her_nemo.data.synthesis.cache import AnswerCache
from her_nemo.data.synthesis.endpoint import Endpoint


def run(cfg: SynthesiseConfig) -> int:
    with pipeline.only_run(Path(cfg.out)):
        asyncio.run(_run(cfg))
    return 0


async def _run(cfg: SynthesiseConfig) -> None:
    cache = AnswerCache(cfg.cache_dir or Path(cfg.out) / "cache")
    if cfg.stage == "principles":
        principles.require_scikit_learn()
    conversations = [] if cfg.stage in ("principles", "judge") else pipeline.load(cfg.source)
    async with Endpoint(cfg.endpoint, cfg.limits, cfg.api_key_env) as endpoint:
        asker = Asker(cfg, endpoint, cache, await endpoint.identity(cfg.model))
        if cfg.stage == "principles":
            report, count = await pipeline.distil_principles(cfg, asker)
            done = f"{count} principles in {Path(cfg.out) / 'library.yaml'}"
        elif cfg.stage == "judge":
            report, done = await judge_transcripts.write_transcripts(cfg, asker)
        else:
            results = await pipeline.synthesise(cfg, conversations, asker)
            report = pipeline.write_results(cfg, conversations, results)
            done = (
                f"{report.conversations} conversations = {report.written} written + {report.quarantined} "
                f"quarantined, in {cfg.out}"
            )
        pipeline.finish(report, cfg, asker)
    print(f"{cfg.name}: {done}")
