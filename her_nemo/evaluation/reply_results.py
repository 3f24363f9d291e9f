"""The replies of `her-nemo evaluate` as results that `her-nemo evaluate compare` reads: a prompt is a scene.

eval.json has the figures of all replies together. Here those that every reply has by itself stand with an interval over
prompts, so that two models can be told apart; entropy, self-BLEU and distinct-n belong to a set of replies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from her_nemo.config.schema import EvaluateConfig
from her_nemo.evaluation.endpoint import fingerprint
from her_nemo.evaluation.oracle import PRINCIPLES
from her_nemo.evaluation.results import Line, MetricName, Results, Scene, metrics_of, versions
from her_nemo.evaluation.vitals import vitals_of_turns
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.turn import parse_turn

NAME = "replies"
RESAMPLES = 2_000  # intervals on hundreds of prompts are as good as with more, and cost a fraction of a second
_SHARES = {
    "format_valid": True,
    "leak_rate": False,
    "name_slips": False,
    "speaks_for_others": False,
    "repetition": False,
}


def results_of_replies(
    cfg: EvaluateConfig,
    rows: Sequence[Mapping[str, Any]],
    *,
    secrets: Sequence[Sequence[str]],
    others: Sequence[Sequence[str]],
) -> tuple[Results, list[Scene]]:
    """(figures with intervals, a scene a reply).

    Args:
        rows: of samples.jsonl.
        secrets, others: of each, as of `vitals`.
    """
    scenes = [_scene(*each) for each in zip(rows, secrets, others, strict=True)]
    drawn = {"resamples": RESAMPLES, "level": 0.95, "seed": cfg.seed}
    names = [name for name in _metric_names() if any(name.name in scene.scores for scene in scenes)]
    results = Results(
        benchmark=NAME,
        protocol="oracle" if cfg.scenes is not None else "vitals",
        name=cfg.name,
        scenes=len({scene.scene_id for scene in scenes}),
        runs=cfg.samples_per_prompt,
        metrics=metrics_of(scenes, names, **drawn),
        judgements=0,
        judgements_failed=0,
        simulations_failed=0,
        max_failure_share=0.0,
        failures={},
        models={"actor": {"model": cfg.model, "fingerprint": fingerprint(cfg.model)}},
        versions=versions(),
        settings={
            "prompts_sha256": hashlib.sha256(Path(cfg.prompts).read_bytes()).hexdigest(),
            "seed": cfg.seed,
            "sampling": cfg.sampling.model_dump(),
        },
        notes=("A prompt is a scene, its samples are its repetitions; figures of whole sets are in eval.json.",),
    )
    return results, scenes


def _scene(row: Mapping[str, Any], secrets: Sequence[str], others: Sequence[str]) -> Scene:
    turn = parse_turn(row["reply"], expect_name=row["character"])
    vital = vitals_of_turns([turn], secrets=[secrets], others=[others])
    scores = {name: value for name in _SHARES if (value := getattr(vital, name)) is not None}
    scores |= {f"words_{kind}": value for kind, value in vital.mean_words.items()}
    if row["score"] is not None:
        scores["oracle_score"] = row["score"]
        scores |= {f"principle_{name}": float(kept) for name, kept in row["principles"].items()}
    speaker = row["character"] or "reply"
    return Scene(
        scene_id=row["trace_id"],
        run=row["sample"],
        title=speaker,
        dialogue=(
            Line("prompt", row["prompt_tail"], "given", Dialect.PLAIN.value),
            Line(speaker, row["reply"], "actor", Dialect.HER.value),
        ),
        scores=scores,
        ended="cut at max_tokens" if row["truncated"] else "",
        info={"brief": row["brief"], "defects": row["defects"]},
    )


def _metric_names() -> list[MetricName]:
    """In the order to show them."""
    return [
        MetricName("oracle_score", "judge"),
        *(MetricName(f"principle_{name}", "principles") for name in PRINCIPLES),
        *(MetricName(name, "", better) for name, better in _SHARES.items()),
        *(MetricName(f"words_{kind.value}", "lengths", None) for kind in Kind),
    ]
