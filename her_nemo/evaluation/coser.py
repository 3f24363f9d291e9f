"""CoSER's given-circumstance acting: each scene played, judged on four dimensions, and summed up.

Wang et al. 2025 (arXiv 2502.09082). Scenes run side by side, the messages of one after the other; every call is cached,
so a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from her_nemo.config.evaluation import ChatModel, CoserConfig
from her_nemo.data.synthesis.prompt_files import PromptFile, load_prompt
from her_nemo.evaluation.coser_judging import Bench, judge, overlap
from her_nemo.evaluation.coser_protocol import DIMENSIONS, PROTOCOLS
from her_nemo.evaluation.coser_scenes import CoserScene, read_scenes
from her_nemo.evaluation.coser_simulation import Play, simulate
from her_nemo.evaluation.endpoint import RoleModel, open_models, run_all, usage_of
from her_nemo.evaluation.results import (
    Line,
    MetricName,
    Results,
    Scene,
    count_failures,
    metrics_of,
    versions,
    write_results,
)
from her_nemo.evaluation.retrieval import Library
from her_nemo.evaluation.servers import Identities, instead
from her_nemo.roleplay.layouts import Layout

PROMPTS = Path(__file__).parent / "prompts"
AVERAGE = "Average"
METRICS = (
    MetricName(AVERAGE, "judge"),
    *(MetricName(dimension, "judge") for dimension in DIMENSIONS),
    MetricName("BLEU", "overlap"),
    MetricName("ROUGE-L", "overlap"),
    MetricName("messages", "dialogue", None),
)


def roles_of(cfg: CoserConfig) -> dict[str, ChatModel]:
    """Role -> who plays it: the Environment and the next-speaker model are the judge's where nobody is named."""
    return {
        "actor": cfg.actor,
        "environment": instead(cfg.environment, cfg.judge),
        "next_speaker": instead(cfg.next_speaker, cfg.judge),
        "judge": cfg.judge,
    }


def benchmark_prompt(name: str, directory: str | None) -> PromptFile:
    """The newest version of a prompt: from `directory` if it has one of this name, else the packaged one."""
    there = directory is not None and any(Path(directory).glob(f"{name}.v*.jinja"))
    return load_prompt(name, directory=directory if there else PROMPTS)


async def run_coser(cfg: CoserConfig, roles: Mapping[str, ChatModel], identities: Identities) -> Results:
    """Play and judge all scenes and write the results.

    Args:
        roles: role -> who plays it, with an endpoint each.
        identities: of roles whose server was started here.

    Raises:
        UserError: the scenes cannot be read, or an endpoint is down or refuses. Answers so far are kept.
    """
    scenes = read_scenes(cfg.scenes, cfg.num_scenes, cfg.dialect)
    units = [(scene, run) for run in range(cfg.runs) for scene in scenes]
    cache = cfg.cache_dir or Path(cfg.out) / "cache"
    async with open_models(roles, cache, cfg.limits, identities) as models:
        play, bench = _stage(cfg, models)

        async def one(unit: tuple[CoserScene, int]) -> Scene:
            return await play_and_judge(*unit, play, bench)

        played = await run_all(
            units, one, concurrency=cfg.limits.concurrency, title="coser", models=list(models.values())
        )
        results = summed_up(cfg, scenes, played, models, play, bench)
    write_results(Path(cfg.out), results, played)
    return results


def _stage(cfg: CoserConfig, models: Mapping[str, RoleModel]) -> tuple[Play, Bench]:
    protocol = PROTOCOLS[cfg.protocol]
    play = Play(
        protocol=protocol,
        layout=protocol.layout if cfg.layout == "auto" else Layout(cfg.layout),
        models=models,
        environment_prompt=benchmark_prompt("coser_environment", cfg.prompts_dir),
        next_speaker_prompt=benchmark_prompt("coser_next_speaker", cfg.prompts_dir),
        max_rounds=cfg.max_rounds,
        continue_from=cfg.continue_from,
        seed=cfg.seed,
        library=_library(cfg),
    )
    bench = Bench(
        protocol=protocol,
        model=models["judge"],
        prompt=benchmark_prompt("coser_judge", cfg.prompts_dir),
        attempts=cfg.judge.attempts,
        structured_output=cfg.judge.structured_output,
    )
    return play, bench


def _library(cfg: CoserConfig) -> Library | None:
    if cfg.retrieval == "none" or cfg.books is None:
        return None
    return Library(cfg.books, cfg.retrieval, held_out=PROTOCOLS[cfg.protocol].held_out_found)


async def play_and_judge(scene: CoserScene, run: int, play: Play, bench: Bench) -> Scene:
    """One scene of one run. A dialogue that could not be played to its end is not judged."""
    done = await simulate(scene, play, run)
    failures = () if done.failure is None else (done.failure,)
    judgements = () if failures else await judge(scene, done, bench, run)
    scores = {j.dimension: j.score for j in judgements if j.score is not None}
    if len(scores) == len(DIMENSIONS):
        scores[AVERAGE] = sum(scores.values()) / len(DIMENSIONS)
    if not failures:
        scores |= overlap(scene, done, play.protocol, play.continue_from)
        scores["messages"] = float(len(done.lines))
    return Scene(
        scene_id=scene.scene_id,
        run=run,
        title=scene.title,
        dialogue=tuple(done.lines),
        reference=tuple(Line(t.speaker, t.message, "given", scene.dialect.value) for t in scene.dialogue),
        judgements=judgements,
        scores=scores,
        failures=failures,
        ended=done.ended,
        info={
            "scenario": scene.scenario,
            "tag": scene.tag,
            "actor_messages": done.actor_messages,
            "given_messages": done.given,
            "truncated": done.truncated,
            "next_speakers": done.predictions,
        },
    )


def summed_up(
    cfg: CoserConfig,
    scenes: Sequence[CoserScene],
    played: Sequence[Scene],
    models: Mapping[str, RoleModel],
    play: Play,
    bench: Bench,
) -> Results:
    """The figures over all scenes and runs."""
    certainty = cfg.statistics
    prompts = (play.environment_prompt, play.next_speaker_prompt, bench.prompt)
    return Results(
        benchmark="coser",
        protocol=cfg.protocol,
        name=cfg.name,
        scenes=len(scenes),
        runs=cfg.runs,
        metrics=metrics_of(
            played, METRICS, resamples=certainty.resamples, level=certainty.level, seed=certainty.seed
        ),
        judgements=sum(len(scene.judgements) for scene in played),
        judgements_failed=sum(j.failure is not None for scene in played for j in scene.judgements),
        simulations_failed=sum(bool(scene.failures) for scene in played),
        max_failure_share=certainty.max_failure_share,
        failures=count_failures(played),
        models={role: dict(model.identity) for role, model in models.items()},
        usage=usage_of(models),
        versions=versions(prompts=", ".join(map(str, prompts))),
        settings=_settings(cfg, play, models),
        notes=(
            f"protocol {cfg.protocol}: " + "; ".join(play.protocol.notes),
            "the prompts are our own wording: compare models with each other here, not with published tables",
        ),
    )


def _settings(cfg: CoserConfig, play: Play, models: Mapping[str, RoleModel]) -> dict[str, Any]:
    return {
        "scenes": cfg.scenes,
        "scenes_sha256": hashlib.sha256(Path(cfg.scenes).read_bytes()).hexdigest(),
        "layout": play.layout.value,
        "max_rounds": cfg.max_rounds,
        "continue_from": cfg.continue_from,
        "retrieval": cfg.retrieval,
        "seed": cfg.seed,
        "sampling": {role: model.sampling.model_dump() for role, model in models.items()},
        "judge_attempts": cfg.judge.attempts,
        "structured_output": cfg.judge.structured_output,
    }
