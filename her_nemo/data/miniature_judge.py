"""The miniature world's judge: pairs, and the transcripts a labeller would have written, made by construction.

Which reply is better, and by what, is known from the flaws that were put in (`miniature_flaws`), never from the
oracle. The reasoning goes through the rule as a plan does, then through the criteria one by one; the verdict names the
criteria that one of the replies lost. Ten in a hundred training pairs have their labels swapped, as `pairs_train.jsonl`
has them, and their transcripts argue for the wrong reply.
"""

from __future__ import annotations

import bisect
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.data.judge_rows import ORDERS, JudgedPair, balance_report, balanced, prompt_rows
from her_nemo.data.miniature import Scene, Split, StyleKind, make_splits, sample_scenes
from her_nemo.data.miniature_files import LABEL_NOISE, TWIN_SHARE
from her_nemo.data.miniature_flaws import Flaw, flawed_reply, sample_pair_flaws
from her_nemo.data.miniature_text import PLAN, prompt_messages, words_of
from her_nemo.roleplay.judging import candidate, context_of
from her_nemo.roleplay.principles import Dimension, Level
from her_nemo.roleplay.verdict import ChosenPrinciple, Comparison, Verdict, Winner, write_verdict

KEPT, LOST = "fine", "lost"
OPPOSED = 2.6  # pairs made for each that is wanted: what balancing leaves out


@dataclass(frozen=True)
class Criterion:
    """What a flaw offends against. `content` is filled with the scene's words: principles are chosen by case."""

    name: str
    dimension: Dimension
    content: str


CRITERIA: dict[Flaw, Criterion] = {
    Flaw.MALFORMED: Criterion("Form", Dimension.OVERALL, "{c} acts and says"),
    Flaw.WRONG_STANCE: Criterion("Stance", Dimension.RELATIONSHIP, "{c} should {stance}"),
    Flaw.THIRD_PERSON_THOUGHT: Criterion("Thought", Dimension.EMOTION, "think as I"),
    Flaw.WRONG_ACTION: Criterion("Deed", Dimension.ACTION, "acts to {stance}"),
    Flaw.OFF_TOPIC: Criterion("Topic", Dimension.DIALOGUE, "talk about the {o}"),
    Flaw.LOST_STYLE: Criterion("Style", Dimension.CHARACTER, "{style} with {phrase}"),
    Flaw.LEAK: Criterion("Secret", Dimension.SAFETY, "hide the {so}"),
    Flaw.LOOP: Criterion("Once", Dimension.NARRATIVE, "says it once"),
}


@dataclass(frozen=True)
class JudgeSizes:
    """Pairs of each file; each pair makes two rows, one an order."""

    sft: int = 2400
    rl: int = 800
    test: int = 300


@dataclass(frozen=True)
class MadePair:
    """A pair, with the flaws that a judge can see in the reply that is labelled better and in the other one."""

    scene: Scene
    judged: JudgedPair
    better_flaws: frozenset[Flaw]
    worse_flaws: frozenset[Flaw]
    flipped: bool


def write_judge_files(out_dir: str | Path, seed: int, sizes: JudgeSizes | None = None) -> dict[str, Any]:
    """`judge_sft.jsonl`, `judge_rl.jsonl` (with label noise) and `judge_test.jsonl` (of the test split, without) under
    `out_dir`; returns pairs made, left out and the balance of each. The same seed and sizes give the same bytes."""
    sizes = sizes or JudgeSizes()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    train, test = make_splits(seed)
    report: dict[str, Any] = {}
    for purpose, split, wanted, noise in (
        ("sft", train, sizes.sft, LABEL_NOISE),
        ("rl", train, sizes.rl, LABEL_NOISE),
        ("test", test, sizes.test, 0.0),
    ):
        made = list(make_pairs(seed, f"judge-{purpose}", split, round(wanted * OPPOSED), noise))
        seen = [pair for pair in made if pair.judged.distinct and pair.better_flaws != pair.worse_flaws]
        kept = _balanced(seen, wanted)
        rows = [row for pair in kept for row in prompt_rows(pair.judged, brief=True)]
        report[purpose] = {
            "pairs": len(kept),
            "left_out": {"alike to a judge": len(made) - len(seen), "for balance": len(seen) - len(kept)},
            "labels_flipped": sum(pair.flipped for pair in kept),
            **balance_report([pair.judged for pair in kept], rows),
        }
        if purpose == "sft":
            rows = [row for pair in kept for row in transcripts(pair)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"judge_{purpose}.jsonl").write_text(lines, encoding="utf-8")
    return report


def make_pairs(seed: int, purpose: str, split: Split, count: int, noise: float) -> Iterator[MadePair]:
    """Pairs as `pairs_train.jsonl` has them, from scenes of their own."""
    for scene in sample_scenes(seed, purpose, split, count):
        rng = random.Random(f"words-{seed}-{scene.trace_id}")
        context = context_of(prompt_messages(rng, scene))
        flaws = sample_pair_flaws(rng)
        twin = rng.random() < TWIN_SHARE
        state = rng.getstate()
        replies, visible = [], []
        for own in flaws:
            if twin:
                rng.setstate(state)
            before = rng.getstate()
            replies.append(candidate(flawed_reply(rng, scene, own, split.names)))
            seen = own - {Flaw.FIRST_PERSON_PLAN}
            if Flaw.MALFORMED in own:
                # Nothing is drawn after the form is broken: without that flaw the words are the same. Some breakages
                # are mended by the judge's view.
                after = rng.getstate()
                rng.setstate(before)
                whole = candidate(flawed_reply(rng, scene, own - {Flaw.MALFORMED}, split.names))
                rng.setstate(after)
                seen -= {Flaw.MALFORMED} if whole == replies[-1] else set()
            visible.append(seen)
        flipped = rng.random() < noise
        if flipped:
            replies.reverse()
            visible.reverse()
        yield MadePair(scene, JudgedPair(scene.trace_id, context, *replies), *visible, flipped)


def _balanced(made: list[MadePair], wanted: int) -> list[MadePair]:
    """The longest run from the beginning of which at most `wanted` are left after balancing, balanced."""

    def kept(count: int) -> list[MadePair]:
        names = {pair.pair_id for pair in balanced([pair.judged for pair in made[:count]])}
        return [pair for pair in made[:count] if pair.judged.pair_id in names]

    count = bisect.bisect_right(range(len(made) + 1), wanted, key=lambda length: len(kept(length))) - 1
    return kept(count)


def transcripts(pair: MadePair) -> list[dict[str, Any]]:
    """The pair in both orders as SFT rows, the verdict as the reply."""
    rows = []
    for row, better in zip(prompt_rows(pair.judged, brief=True), ORDERS, strict=True):
        reply = {"role": "assistant", "content": transcript(pair, better)}
        rows.append({"trace_id": row["trace_id"], "messages": [*row["messages"], reply]})
    return rows


def transcript(pair: MadePair, better: Winner) -> str:
    """Reasoning and verdict, the better reply standing where `better` says.

    A flipped pair's transcript finds the flaws of each reply in the other one.
    """
    good, bad = pair.better_flaws, pair.worse_flaws
    if pair.flipped:
        good, bad = bad, good
    first, second = (good, bad) if better is Winner.CAND_1 else (bad, good)
    words = {**words_of(pair.scene), "style": StyleKind(pair.scene.style_kind).value}
    lines = [PLAN.format(**words)]
    principles, comparisons = [], []
    for flaw, criterion in CRITERIA.items():
        lost = (flaw in first, flaw in second)
        lines.append(f"{criterion.name} {' '.join(LOST if is_lost else KEPT for is_lost in lost)}")
        if not any(lost):
            continue
        losers = " ".join(order.value for order, is_lost in zip(ORDERS, lost, strict=True) if is_lost)
        principles.append(
            ChosenPrinciple(
                criterion.name,
                criterion.dimension,
                Level.SENTENCE,
                criterion.content.format(**words),
                f"{losers} lost it",
            )
        )
        winner = Winner.TIE if all(lost) else Winner.CAND_2 if lost[0] else Winner.CAND_1
        comparisons.append(Comparison(criterion.name, winner))
    verdict = Verdict(tuple(principles), tuple(comparisons), f"{better.swapped.value} lost more", better)
    return write_verdict(verdict, "\n".join(lines))


def judge_vocabulary() -> list[str]:
    """Pieces of verdicts that get a token each: a real Qwen3 has few for them, the demo's tokenizer never saw JSON."""
    scaffold = [
        '{"principles":[{"name":"',
        '","dimension":"',
        '","level":"',
        '","content":"',
        '","reason":"',
        '"},{"name":"',
        '"}],"comparisons":[{"principle":"',
        '","winner":"',
        '"},{"principle":"',
        '"}],"analysis":"',
        '","better_response":"',
        '"}',
    ]
    words = [*Winner, Level.SENTENCE, *(criterion.name for criterion in CRITERIA.values())]
    dimensions = dict.fromkeys(criterion.dimension for criterion in CRITERIA.values())
    return [*scaffold, *map(str, words), *map(str, dimensions)]
