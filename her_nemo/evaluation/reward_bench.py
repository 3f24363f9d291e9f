"""A reward model on labelled pairs: scores or verdicts become outcomes, the report, and the shared results.

Written as results of a benchmark whose scenes are pairs, two reward models can be put side by side with
`her-nemo evaluate compare`, and their accuracies differ by a paired interval: a scalar one and a judge, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.evaluation.endpoint import fingerprint
from her_nemo.evaluation.preference_report import (
    VALUES,
    Order,
    Outcome,
    PairOutcome,
    PreferenceReport,
    length_group,
    outcome_of_scores,
    outcome_of_verdict,
    preference_report,
)
from her_nemo.evaluation.results import (
    Failure,
    FailureKind,
    Line,
    MetricName,
    Results,
    Scene,
    count_failures,
    metrics_of,
    versions,
)
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.measures import words
from her_nemo.roleplay.verdict import Winner

if TYPE_CHECKING:  # it brings torch, which verdicts need not wait for
    from her_nemo.data.tokenise import Dropped

NAME = "reward_model"
SCALAR, VERDICTS = "scalar", "verdicts"
_ORDERS = {Winner.CAND_1: Order.CHOSEN_FIRST, Winner.CAND_2: Order.CHOSEN_SECOND, Winner.TIE: Order.NONE}
Scores = tuple[float, float]


def outcomes_of(
    cfg: RewardBenchConfig, rows: Sequence[Mapping[str, Any]], scores: Sequence[Scores | Dropped]
) -> list[PairOutcome]:
    """Each pair's outcome. Pairs of one prompt are numbered, so that each has an id of its own."""
    seen: Counter[str] = Counter()
    found = []
    for row, score in zip(rows, scores, strict=True):
        trace = row["trace_id"]
        pair_id = f"{trace}#{seen[trace]}" if seen[trace] else trace
        seen[trace] += 1
        lost = not isinstance(score, tuple) or not all(map(math.isfinite, score))
        found.append(
            PairOutcome(
                pair_id,
                Outcome.FAILED if lost else outcome_of_scores(*score, cfg.tie_margin),
                len(words(row["chosen"])),
                len(words(row["rejected"])),
                dimensions=_dimensions(row, cfg.dimension_key),
                margin=None if lost else score[0] - score[1],
                failure="" if not lost else "not_finite" if isinstance(score, tuple) else score.reason,
            )
        )
    return found


def _dimensions(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = row.get(key)
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(str(name) for name in given)


def outcomes_of_verdicts(rows: Sequence[Mapping[str, Any]]) -> list[PairOutcome]:
    """The outcome of each row of `samples.jsonl` as `her-nemo judge` writes it: one order of a pair.

    Raises:
        KeyError, TypeError, ValueError: a row is not one of those.
    """
    found = []
    for row in rows:
        label = Winner(row["better"])
        said = None if row["said"] is None else Winner(row["said"])
        first, second = (int(count) for count in row["words"])
        chosen, rejected = (second, first) if label is Winner.CAND_2 else (first, second)
        order = _ORDERS[label]
        found.append(
            PairOutcome(
                row["pair"] if order else row["trace_id"],
                outcome_of_verdict(label, said),
                chosen,
                rejected,
                order=order,
                failure="" if said else (row["problem"] or "unreadable").split(":")[0],
            )
        )
    return found


def run_reward_bench(
    cfg: RewardBenchConfig, rows: Sequence[Mapping[str, Any]], pairs: Sequence[PairOutcome]
) -> tuple[PreferenceReport, Results, list[Scene]]:
    """(the report, the shared results, a scene for each pair and order) from the outcomes of the rows."""
    certainty = cfg.statistics
    drawn = {"resamples": certainty.resamples, "level": certainty.level, "seed": certainty.seed}
    report = preference_report(pairs, max_failure_share=certainty.max_failure_share, **drawn)
    scenes = [_scene(row, pair) for row, pair in zip(rows, pairs, strict=True)]
    by_verdicts = cfg.verdicts is not None
    names = [MetricName("accuracy", "judge"), *([] if by_verdicts else [MetricName("margin", "", None)])]
    metrics = metrics_of(scenes, names, **drawn)
    for name in sorted({name for scene in scenes for name in scene.info["groups"]}):
        own = [scene for scene in scenes if name in scene.info["groups"]]
        metrics += metrics_of(own, [MetricName(name, name.split(":")[0])], **drawn)
    identity = {"verdicts": str(cfg.verdicts)}
    if cfg.model is not None:
        identity = {"model": cfg.model, "fingerprint": fingerprint(cfg.model)}
    results = Results(
        benchmark=NAME,
        protocol=VERDICTS if by_verdicts else SCALAR,
        name=cfg.name,
        scenes=len({scene.scene_id for scene in scenes}),
        runs=len({scene.run for scene in scenes}),
        metrics=metrics,
        judgements=len(scenes),
        judgements_failed=report.overall.failed,
        simulations_failed=0,
        max_failure_share=certainty.max_failure_share,
        failures=count_failures(scenes),
        models={"actor": identity},
        versions=versions(),
        settings={"pairs": cfg.pairs, "tie_margin": cfg.tie_margin, "max_length": cfg.max_length},
        notes=(
            "A pair is a scene; its value is 1, 0.5 (a tie) or 0.",
            *(("Its repetitions are the orders: first with the better reply first.",) if by_verdicts else ()),
        ),
    )
    return report, results, scenes


def _scene(row: Mapping[str, Any], pair: PairOutcome) -> Scene:
    groups = [f"length:{length_group(pair.chosen_length, pair.rejected_length)}"]
    groups += [f"order:{pair.order.value}"] if pair.order else []
    groups += [f"dimension:{name}" for name in pair.dimensions]
    scores: dict[str, float] = {}
    failures: tuple[Failure, ...] = ()
    if pair.outcome is Outcome.FAILED:
        cut = "verdict" not in row and pair.failure  # a pair that did not fit in
        kind = FailureKind.TRUNCATED if cut else FailureKind.UNPARSABLE
        failures = (Failure(kind, pair.failure or "a score is not finite", "model"),)
    else:
        scores = dict.fromkeys(("accuracy", *groups), VALUES[pair.outcome])
        scores |= {} if pair.margin is None else {"margin": pair.margin}
    return Scene(
        scene_id=pair.pair_id,
        run=int(pair.order is Order.CHOSEN_SECOND),
        title=pair.pair_id,
        dialogue=_lines(row),
        scores=scores,
        failures=failures,
        ended=pair.outcome.value,
        info={"groups": groups},
    )


def _lines(row: Mapping[str, Any]) -> tuple[Line, ...]:
    plain, her = Dialect.PLAIN.value, Dialect.HER.value
    if "verdict" in row:
        return (Line("judge", row["verdict"], "actor", plain),)
    return (
        Line("prompt", row["messages"][-1]["content"], "given", plain),
        Line("chosen", row["chosen"], "chosen", her),
        Line("rejected", row["rejected"], "rejected", her),
    )
