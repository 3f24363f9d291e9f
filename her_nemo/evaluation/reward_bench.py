"""A scalar reward model on labelled pairs: scores from transformers, the report, and the shared results.

Written as results of a benchmark whose scenes are pairs, two reward models can be put side by side with
`her-nemo evaluate compare`, and their accuracies differ by a paired interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForSequenceClassification

from her_nemo.config.errors import UserError
from her_nemo.config.reward_bench import RewardBenchConfig
from her_nemo.data.loaders import collate_pairs
from her_nemo.data.tokenise import Dropped, Sample, Tokeniser, encode_pair
from her_nemo.evaluation.endpoint import fingerprint
from her_nemo.evaluation.preference_report import (
    Outcome,
    PairOutcome,
    PreferenceReport,
    length_group,
    outcome_of_scores,
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
from her_nemo.rewards.scalar import score_at_last_token
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.measures import words

NAME = "reward_model"
_VALUE = {Outcome.RIGHT: 1.0, Outcome.TIE: 0.5, Outcome.WRONG: 0.0}
Scores = tuple[float, float]


@torch.no_grad()
def score_pairs(
    model: str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    micro_batch_size: int = 8,
    dtype: str = "auto",
) -> Iterator[Scores | Dropped]:
    """(score of the chosen reply, of the rejected one) of each pair in turn, or why it could not be scored.

    Prompts and replies are encoded as in training, and the score is the scalar head at the reply's last token, in
    fp32.

    Raises:
        UserError: the directory holds no scalar-headed Qwen3.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    network, info = Qwen3ForSequenceClassification.from_pretrained(
        model, dtype=kind, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or network.score.out_features != 1:
        raise UserError(
            f"model={model}: no scalar-headed Qwen3 (missing: {', '.join(sorted(info['missing_keys'])) or 'none'}; "
            f"{network.score.out_features} outputs); export a reward model and give that directory"
        )
    network = network.to(device).eval()
    head = network.score.weight.float()
    tokeniser = Tokeniser(Path(model))
    limit = max_length or int(network.config.max_position_embeddings)
    for start in range(0, len(rows), micro_batch_size):
        encoded = [encode_pair(tokeniser, row, limit) for row in rows[start : start + micro_batch_size]]
        whole = [pair for pair in encoded if not isinstance(pair, Dropped)]
        scores = iter(_scores(network, head, whole, tokeniser.pad_id))
        for pair in encoded:
            yield pair if isinstance(pair, Dropped) else next(scores)


def _scores(
    network: Qwen3ForSequenceClassification,
    head_1H: torch.Tensor,
    pairs: Sequence[tuple[Sample, Sample]],
    pad_id: int,
) -> list[Scores]:
    if not pairs:
        return []
    batch = collate_pairs(pairs, pad_id)
    # On the right, padding is never attended to: attention is causal.
    hidden_BSH = network.model(input_ids=batch["tokens_BS"].to(network.device)).last_hidden_state
    values_BS = (hidden_BSH.float() @ head_1H.T).squeeze(-1)
    scores = score_at_last_token(values_BS, batch["lengths_B"].to(values_BS.device)).tolist()
    return list(zip(scores[0::2], scores[1::2], strict=True))


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
        lost = isinstance(score, Dropped)
        found.append(
            PairOutcome(
                pair_id,
                Outcome.FAILED if lost else outcome_of_scores(*score, cfg.tie_margin),
                len(words(row["chosen"])),
                len(words(row["rejected"])),
                dimensions=_dimensions(row, cfg.dimension_key),
                margin=None if lost else score[0] - score[1],
                failure=score.reason if lost else "",
            )
        )
    return found


def _dimensions(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = row.get(key)
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(str(name) for name in given)


def run_reward_bench(
    cfg: RewardBenchConfig, rows: Sequence[Mapping[str, Any]], scores: Sequence[Scores | Dropped]
) -> tuple[PreferenceReport, Results, list[Scene]]:
    """(the report, the shared results, one scene a pair) from the scores."""
    pairs = outcomes_of(cfg, rows, scores)
    certainty = cfg.statistics
    drawn = {"resamples": certainty.resamples, "level": certainty.level, "seed": certainty.seed}
    report = preference_report(pairs, max_failure_share=certainty.max_failure_share, **drawn)
    scenes = [_scene(row, pair) for row, pair in zip(rows, pairs, strict=True)]
    names = sorted({name for scene in scenes for name in scene.scores if name not in ("accuracy", "margin")})
    metrics = metrics_of(scenes, [MetricName("accuracy", "judge"), MetricName("margin", "", None)], **drawn)
    for name in names:
        own = [scene for scene in scenes if name in scene.info["groups"]]
        metrics += metrics_of(own, [MetricName(name, name.split(":")[0])], **drawn)
    results = Results(
        benchmark=NAME,
        protocol="scalar",
        name=cfg.name,
        scenes=len(scenes),
        runs=1,
        metrics=metrics,
        judgements=len(scenes),
        judgements_failed=report.overall.failed,
        simulations_failed=0,
        max_failure_share=certainty.max_failure_share,
        failures=count_failures(scenes),
        models={"actor": {"model": str(cfg.model), "fingerprint": fingerprint(cfg.model)}},
        versions=versions(),
        settings={"pairs": cfg.pairs, "tie_margin": cfg.tie_margin, "max_length": cfg.max_length},
        notes=("Ties count half. A pair is a scene; its value is 1, 0.5 or 0.",),
    )
    return report, results, scenes


def _scene(row: Mapping[str, Any], pair: PairOutcome) -> Scene:
    groups = [f"length:{length_group(pair.chosen_length, pair.rejected_length)}"]
    groups += [f"dimension:{name}" for name in pair.dimensions]
    scores: dict[str, float] = {}
    failures: tuple[Failure, ...] = ()
    if pair.margin is None or pair.outcome is Outcome.FAILED:
        said = pair.failure or "a score is not finite"
        failures = (
            Failure(FailureKind.TRUNCATED if pair.failure else FailureKind.UNPARSABLE, said, "model"),
        )
    else:
        scores = dict.fromkeys(("accuracy", *groups), _VALUE[pair.outcome]) | {"margin": pair.margin}
    plain, her = Dialect.PLAIN.value, Dialect.HER.value
    return Scene(
        scene_id=pair.pair_id,
        run=0,
        title=pair.pair_id,
        dialogue=(
            Line("prompt", row["messages"][-1]["content"], "given", plain),
            Line("chosen", row["chosen"], "chosen", her),
            Line("rejected", row["rejected"], "rejected", her),
        ),
        scores=scores,
        failures=failures,
        ended=pair.outcome.value,
        info={"groups": groups},
    )
