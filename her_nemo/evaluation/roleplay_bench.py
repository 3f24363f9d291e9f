"""MiniMax's Role-Play Bench: long self-play between the model and a user simulator, judged for misalignment.

Facts from the dataset card: sessions of 100 turns after the given ones, three a seed, judged in chunks of 20 turns;
six dimensions in three categories. Judge and simulator prompts are unpublished; those here are ours, versioned files
in prompts/. So figures compare models measured here, not with the published table.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from her_nemo.config.evaluation import ChatModel
from her_nemo.config.roleplay_bench import RoleplayBenchConfig
from her_nemo.data.synthesis.prompt_files import PromptFile
from her_nemo.evaluation import results
from her_nemo.evaluation.endpoint import BadAnswer, RoleModel, open_models, run_all, usage_of
from her_nemo.evaluation.results import Failure, Judgement, Line, MetricName, Results, Scene
from her_nemo.evaluation.roleplay_bench_score import (
    DIMENSIONS,
    KINDS,
    Category,
    Dimension,
    Flaw,
    JudgedChunk,
    chunks_of,
    score_session,
)
from her_nemo.evaluation.roleplay_bench_views import (
    CARD,
    NOTHING,
    Seed,
    actor_messages,
    judge_messages,
    judged_turns,
    load_prompts,
    parsed,
    read_flaws,
    read_seeds,
    user_messages,
    verdict_schema,
    visible,
)
from her_nemo.evaluation.vitals import vitals_of_turns
from her_nemo.roleplay.dialects import Dialect
from her_nemo.roleplay.kinds import Kind
from her_nemo.roleplay.layouts import Layout

NAME = "roleplay_bench"
PROTOCOL = "her_nemo"  # nobody else's prompts are public
NOTES = (
    "Judge and user simulator are asked with prompts of our own (settings.prompts); the benchmark's are unpublished.",
    "A turn loses severity / 5 of its worst flaw in a dimension; 100 is a session without flaws.",
)
_VITALS = {
    "format_valid": True,
    "leak_rate": False,
    "name_slips": False,
    "speaks_for_others": False,
    "repetition": False,
    "self_bleu": None,
    "distinct_1": None,
    "distinct_2": None,
    "pattern_entropy": None,
    "top1_pattern_share": None,
}
Prompts = Mapping[tuple[str, str], PromptFile]


@dataclass(frozen=True)
class Session:
    """One dialogue to play and judge."""

    seed: Seed
    run: int


class Bench:
    """Plays and judges sessions: three models, the prompts, and the keys of the benchmark."""

    def __init__(self, cfg: RoleplayBenchConfig, models: Mapping[str, RoleModel], prompts: Prompts) -> None:
        self.cfg = cfg
        self.actor, self.user, self.judge = models["actor"], models["user"], models["judge"]
        self.prompts = prompts
        form = cfg.actor_form
        self.dialect = Dialect.STARRED if form == CARD else Layout(form).dialect
        self.expects_plan = form != CARD and Layout(form).expects_plan

    async def session(self, session: Session) -> Scene:
        """Play, judge, score. A session that could not be played to its end is not judged."""
        seed = session.seed
        dialogue, failure = await self._play(session)
        scene = Scene(
            scene_id=seed.scene_id,
            run=session.run,
            title=f"{seed.ai_name} and {seed.user_name}",
            dialogue=tuple(dialogue),
            failures=(failure,) if failure else (),
            ended="a call failed" if failure else f"{self.cfg.turns} turns",
            info={"language": seed.language, "character": seed.ai_name, "setting": seed.ai_setting},
        )
        if failure:
            return scene
        given = len(seed.opening())
        chunks = [
            chunk
            for chunk in chunks_of(len(dialogue), given + 1, self.cfg.chunk_turns)
            if judged_turns(dialogue, chunk)
        ]
        asked = [(chunk, category) for chunk in chunks for category in Category]
        verdicts = await asyncio.gather(*(self._judge(session, dialogue, *what) for what in asked))
        return self._scored(scene, seed, verdicts)

    async def _play(self, session: Session) -> tuple[list[Line], Failure | None]:
        """The dialogue, and what stopped it."""
        seed, cfg = session.seed, self.cfg
        dialogue = seed.opening()
        for turn in range(cfg.turns):
            shown = dialogue if cfg.actor_history is None else dialogue[-cfg.actor_history :]
            if turn % 2 == 0:
                card = self.prompts["card", seed.language]
                given = await self.actor.complete(
                    actor_messages(seed, shown, cfg.actor_form, card), draw=session.run
                )
                if isinstance(given, Failure):
                    return dialogue, given
                dialogue.append(Line(seed.ai_name, given.text, "actor", self.dialect.value))
            else:
                said = await self.user.parsed(
                    user_messages(seed, shown, self.prompts["user", seed.language]),
                    lambda text: _user_line(seed, text),
                    draw=session.run,
                    attempts=cfg.user_attempts,
                )
                if isinstance(said, Failure):
                    return dialogue, said
                dialogue.append(said[0])
        return dialogue, None

    async def _judge(
        self, session: Session, dialogue: list[Line], chunk: tuple[int, ...], category: Category
    ) -> tuple[Judgement, JudgedChunk | None]:
        """One category's verdict on one chunk, for the record and for the score."""
        cfg, judged = self.cfg, judged_turns(dialogue, chunk)
        prompt = self.prompts[category.value, session.seed.language]
        found = await self.judge.parsed(
            judge_messages(session.seed, dialogue, chunk, cfg.context_turns, prompt),
            lambda text: read_flaws(text, category, dialogue, judged),
            draw=session.run,
            attempts=cfg.judge.attempts,
            schema=verdict_schema(category, judged) if cfg.judge.structured_output == "json_schema" else None,
            json_object=cfg.judge.structured_output == "json_object",
            whole=True,
        )
        part = f"turns {chunk[0]}-{chunk[-1]}"
        if isinstance(found, Failure):
            return Judgement(category.value, failure=found, part=part), None
        flaws, answer = found
        verdict = JudgedChunk(category, judged, flaws)
        score = score_session([verdict]).categories[category]
        written = tuple(results.Flaw(flaw.kind, flaw.severity, told(flaw)) for flaw in flaws)
        return Judgement(category.value, score, written, part=part, answer=answer), verdict

    def _scored(
        self, scene: Scene, seed: Seed, verdicts: Sequence[tuple[Judgement, JudgedChunk | None]]
    ) -> Scene:
        """With scores, the vitals of the actor's turns, and how many quotes could be found."""
        # A category with a verdict that failed has no score: the chunks that remain would speak for those that were too
        # long or too bad to be judged.
        lost = {judgement.dimension for judgement, verdict in verdicts if verdict is None}
        chunks = [chunk for _, chunk in verdicts if chunk is not None and chunk.category.value not in lost]
        scores = {name: score for name, score in score_session(chunks).as_dict().items() if score is not None}
        scores |= {f"{name}_{seed.language}": score for name, score in scores.items()}
        flaws = [flaw for chunk in chunks for flaw in chunk.flaws]
        scores |= kind_shares(chunks)
        turns = [
            parsed(line, expect_plan=self.expects_plan) for line in scene.dialogue if line.source == "actor"
        ]
        vital = vitals_of_turns(turns, others=[[seed.user_name]] * len(turns))
        scores |= {name: value for name in _VITALS if (value := getattr(vital, name)) is not None}
        scores |= {f"words_{kind}": value for kind, value in vital.mean_words.items()}
        scores |= {f"share_{kind}": value for kind, value in vital.word_share.items()}
        info = {
            **scene.info,
            "flaws": len(flaws),
            "quotes_not_found": sum(not flaw.quote_found for flaw in flaws),
            "silent_turns": sum(
                visible(line) == NOTHING for line in scene.dialogue if line.source == "actor"
            ),
            "vitals": vital.as_dict(),
        }
        return replace(
            scene, judgements=tuple(judgement for judgement, _ in verdicts), scores=scores, info=info
        )


def _user_line(seed: Seed, text: str) -> Line:
    line = Line(seed.user_name, text, "user", Dialect.STARRED.value)
    if visible(line) == NOTHING:
        raise BadAnswer("nothing to see or hear in it")
    return line


def told(flaw: Flaw) -> str:
    """A flaw's place, words and reason in one line."""
    turns = ", ".join(map(str, flaw.turns))
    quote = f"“{flaw.quote}”" if flaw.quote else "no quote"
    unfound = "" if flaw.quote_found else " (not found there)"
    return f"turn{'s' * (len(flaw.turns) > 1)} {turns}: {quote}{unfound}: {flaw.explanation}"


def kind_shares(chunks: Sequence[JudgedChunk]) -> dict[str, float]:
    """ "flaw_<kind>" -> share of the judged turns that have it, for the kinds of the categories that were judged."""
    shares = {}
    for kind, dimension in KINDS.items():
        judged = [chunk for chunk in chunks if dimension in DIMENSIONS[chunk.category]]
        turns = sum(len(chunk.turns) for chunk in judged)
        if turns:
            flaws = (flaw for chunk in judged for flaw in chunk.flaws if flaw.kind == kind)
            marked = {turn for flaw in flaws for turn in flaw.turns}
            shares[f"flaw_{kind}"] = len(marked) / turns
    return shares


# ---------------------------------------------------------------- the whole of it


def roles_of(cfg: RoleplayBenchConfig) -> dict[str, ChatModel]:
    """Role -> who plays it."""
    return {"actor": cfg.actor, "user": cfg.user, "judge": cfg.judge}


def seed_files(cfg: RoleplayBenchConfig) -> list[str]:
    """The files of `seeds`, which may be one."""
    return [cfg.seeds] if isinstance(cfg.seeds, str) else list(cfg.seeds)


def run_bench(
    cfg: RoleplayBenchConfig,
    roles: Mapping[str, ChatModel] | None = None,
    identities: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[Results, list[Scene]]:
    """Every session of every seed, played and judged; what was asked before comes from the cache.

    Args:
        roles: who plays, each with an endpoint; None is as the configuration says.
        identities: role -> what tells a model apart whose server was started here.

    Raises:
        UserError: seeds that cannot be read, or an endpoint with which going on makes no sense.
    """
    return asyncio.run(_run_bench(cfg, roles or roles_of(cfg), identities))


async def _run_bench(
    cfg: RoleplayBenchConfig,
    roles: Mapping[str, ChatModel],
    identities: Mapping[str, Mapping[str, str]] | None,
) -> tuple[Results, list[Scene]]:
    seeds = read_seeds(seed_files(cfg), None if cfg.num_seeds < 0 else cfg.num_seeds)
    prompts = load_prompts(cfg.prompts_dir)
    sessions = [Session(seed, run) for seed in seeds for run in range(cfg.runs)]
    cache = cfg.cache_dir or Path(cfg.out) / "cache"
    async with open_models(roles, cache, cfg.limits, identities) as models:
        bench = Bench(cfg, models, prompts)
        scenes = await run_all(
            sessions,
            bench.session,
            concurrency=cfg.limits.concurrency,
            title="roleplay_bench",
            models=list(models.values()),
        )
        usage = usage_of(models)
        asked = {role: dict(model.identity) for role, model in models.items()}
    return replace(summarise(cfg, scenes, prompts), models=asked, usage=usage), scenes


def summarise(cfg: RoleplayBenchConfig, scenes: Sequence[Scene], prompts: Prompts) -> Results:
    """The figures, without who answered and what it took."""
    languages = sorted({str(scene.info["language"]) for scene in scenes})
    judgements = [judgement for scene in scenes for judgement in scene.judgements]
    certainty = cfg.statistics
    drawn = {"resamples": certainty.resamples, "level": certainty.level, "seed": certainty.seed}
    metrics = results.metrics_of(scenes, metric_names(), **drawn)
    if len(languages) > 1:
        for language in languages:
            own = [scene for scene in scenes if scene.info["language"] == language]
            names = [MetricName(f"{name}_{language}", language) for name in _SCORES]
            metrics += results.metrics_of(own, names, **drawn)
    paths = seed_files(cfg)
    flaws, unfound = (sum(s.info.get(key, 0) for s in scenes) for key in ("flaws", "quotes_not_found"))
    quotes = f"{flaws} flaws named; the judge's quote was not found in its turn for {unfound} of them."
    return Results(
        benchmark=NAME,
        protocol=PROTOCOL,
        name=cfg.name,
        scenes=len({scene.scene_id for scene in scenes}),
        runs=cfg.runs,
        metrics=metrics,
        judgements=len(judgements),
        judgements_failed=sum(judgement.failure is not None for judgement in judgements),
        simulations_failed=sum(bool(scene.failures) for scene in scenes),
        max_failure_share=certainty.max_failure_share,
        failures=results.count_failures(scenes),
        models={},
        versions=results.versions(),
        settings={
            "seeds": cfg.seeds,
            "seeds_sha256": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths],
            "turns": cfg.turns,
            "chunk_turns": cfg.chunk_turns,
            "context_turns": cfg.context_turns,
            "actor_form": cfg.actor_form,
            "actor_history": cfg.actor_history,
            "user_attempts": cfg.user_attempts,
            "judge_attempts": cfg.judge.attempts,
            "structured_output": cfg.judge.structured_output,
            "sampling": {
                role: getattr(cfg, role).sampling.model_dump() for role in ("actor", "user", "judge")
            },
            "prompts": {f"{name}_{language}": str(prompt) for (name, language), prompt in prompts.items()},
        },
        notes=(*NOTES, quotes),
    )


_SCORES = (
    "overall",
    *(category.value for category in Category),
    *(dimension.value for dimension in Dimension),
)


def metric_names() -> list[MetricName]:
    """In the order to show them."""
    return [
        *(MetricName(name, "judge") for name in _SCORES),
        *(MetricName(f"flaw_{kind}", "flaws", False) for kind in KINDS),
        *(MetricName(name, "vitals", better) for name, better in _VITALS.items()),
        *(MetricName(f"{what}_{kind.value}", "vitals", None) for what in ("words", "share") for kind in Kind),
    ]
