"""The miniature world's judge: pairs, and the transcripts a labeller would have written, made by construction.

Both replies of a pair have flaws of their own, as two replies of a policy do; the one that loses fewer criteria is
better. What a reply loses is known from the flaws that were put in (`miniature_flaws`), never from the oracle. The
reasoning goes through the rule as a plan does, then through the criteria one by one; the verdict names those that one
of the replies lost. Transcripts are right, as those of `her-nemo data synthesise stage=judge` agree with their labels;
of the labels that RL learns from, ten in a hundred are swapped, as `pairs_train.jsonl` has them.
"""

from __future__ import annotations

import bisect
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from her_nemo.data.judge_rows import ORDERS, JudgedPair, balance_report, balanced, prompt_rows
from her_nemo.data.miniature import STANCES, Scene, Split, make_splits, sample_scenes
from her_nemo.data.miniature_files import LABEL_NOISE, TWIN_SHARE
from her_nemo.data.miniature_flaws import Flaw, flawed_reply, sample_flaws
from her_nemo.data.miniature_text import ACTIONS, PLAN, prompt_messages, words_of
from her_nemo.roleplay.judging import candidate, context_of
from her_nemo.roleplay.principles import Dimension, Level
from her_nemo.roleplay.verdict import ChosenPrinciple, Comparison, Verdict, Winner, write_verdict

KEPT, LOST, NOTHING = "fine", "lost", "nothing"
MADE = 5.0  # pairs made for each that is wanted: ties and what balancing leaves out
TIES_KEPT = 0.4  # of the pairs whose replies lose equally many, for SFT and RL; none in the test
# Each flaw's rate in every reply: more than a policy has, so that a transcript finds something; those that policies
# have most of (the stance, what hangs on it, the phrase) are the most frequent here too.
RATES: dict[Flaw, float] = {
    Flaw.WRONG_STANCE: 0.2,
    Flaw.FIRST_PERSON_PLAN: 0.0,
    Flaw.THIRD_PERSON_THOUGHT: 0.1,
    Flaw.WRONG_ACTION: 0.15,
    Flaw.OFF_TOPIC: 0.15,
    Flaw.LOST_STYLE: 0.2,
    Flaw.LEAK: 0.1,
    Flaw.LOOP: 0.15,
    Flaw.MALFORMED: 0.1,
}


@dataclass(frozen=True)
class Criterion:
    """What a flaw offends against. `content` is filled with the scene's words: principles are chosen by case."""

    name: str
    dimension: Dimension
    content: str


# In the order in which a judge goes through them: the stance and the deed, which the rule has just told, first.
CRITERIA: dict[Flaw, Criterion] = {
    Flaw.WRONG_STANCE: Criterion("Stance", Dimension.RELATIONSHIP, "{stance}"),
    Flaw.WRONG_ACTION: Criterion("Deed", Dimension.ACTION, "{stance}"),
    Flaw.OFF_TOPIC: Criterion("Topic", Dimension.DIALOGUE, "the {o}"),
    Flaw.LOST_STYLE: Criterion("Style", Dimension.CHARACTER, "{phrase}"),
    Flaw.THIRD_PERSON_THOUGHT: Criterion("Thought", Dimension.EMOTION, "think as I"),
    Flaw.LEAK: Criterion("Secret", Dimension.SAFETY, "hide the {so}"),
    Flaw.LOOP: Criterion("Once", Dimension.NARRATIVE, "once"),
    Flaw.MALFORMED: Criterion("Form", Dimension.OVERALL, "whole"),
}


@dataclass(frozen=True)
class JudgeSizes:
    """Pairs of each file; each pair makes two rows, one an order."""

    sft: int = 2400
    rl: int = 800
    test: int = 300


@dataclass(frozen=True)
class MadePair:
    """A pair, and which criteria (by their flaws) the reply that is labelled better and the other one lose."""

    scene: Scene
    judged: JudgedPair
    better_lost: frozenset[Flaw]
    worse_lost: frozenset[Flaw]
    flipped: bool

    @property
    def tied(self) -> bool:
        return len(self.better_lost) == len(self.worse_lost)


def write_judge_files(out_dir: str | Path, seed: int, sizes: JudgeSizes | None = None) -> dict[str, Any]:
    """`judge_sft.jsonl`, `judge_rl.jsonl` (with label noise) and `judge_test.jsonl` (of the test split, without ties)
    under `out_dir`; returns pairs made, left out and the balance of each. The same seed and sizes give the same bytes.
    """
    sizes = sizes or JudgeSizes()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    train, test = make_splits(seed)
    report: dict[str, Any] = {}
    for purpose, split, wanted, noise, ties in (
        ("sft", train, sizes.sft, 0.0, TIES_KEPT),
        ("rl", train, sizes.rl, LABEL_NOISE, TIES_KEPT),
        ("test", test, sizes.test, 0.0, 0.0),
    ):
        made = list(make_pairs(seed, f"judge-{purpose}", split, round(wanted * MADE), noise, ties))
        seen = [pair for pair in made if pair.judged.distinct]
        kept = _balanced(seen, wanted)
        rows = [row for pair in kept for row in label_rows(pair)]
        report[purpose] = {
            "pairs": len(kept),
            "ties": sum(pair.tied for pair in kept),
            "left_out": {"alike to a judge": len(made) - len(seen), "for balance": len(seen) - len(kept)},
            "labels_flipped": sum(pair.flipped for pair in kept),
            **balance_report([pair.judged for pair in kept], rows),
        }
        if purpose == "sft":
            rows = [row for pair in kept for row in transcripts(pair)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"judge_{purpose}.jsonl").write_text(lines, encoding="utf-8")
    return report


def make_pairs(
    seed: int, purpose: str, split: Split, count: int, noise: float, ties: float = 1.0
) -> Iterator[MadePair]:
    """Pairs from `count` scenes of their own, `ties` of those that are a tie; `noise`: share of swapped labels."""
    for scene in sample_scenes(seed, purpose, split, count):
        rng = random.Random(f"words-{seed}-{scene.trace_id}")
        context = context_of(prompt_messages(rng, scene))
        twin = rng.random() < TWIN_SHARE
        flaws = [sample_flaws(rng, RATES) for _ in range(2)]
        state = rng.getstate()
        made: list[tuple[str, frozenset[Flaw]]] = []
        for own in flaws:
            if twin:
                rng.setstate(state)
            made.append(_made_reply(rng, scene, own, split))
        made.sort(key=lambda reply: len(reply[1]))  # stable: a tie stays as it was drawn
        flipped = rng.random() < noise
        kept_tie = rng.random() < ties
        (better, better_lost), (worse, worse_lost) = made
        tied = len(better_lost) == len(worse_lost)
        if tied and not kept_tie:
            continue
        flipped = flipped and not tied
        pair = JudgedPair(scene.trace_id, context, better, worse)
        if flipped:
            pair = JudgedPair(scene.trace_id, context, worse, better)
            better_lost, worse_lost = worse_lost, better_lost
        yield MadePair(scene, pair, better_lost, worse_lost, flipped)


def _made_reply(
    rng: random.Random, scene: Scene, flaws: frozenset[Flaw], split: Split
) -> tuple[str, frozenset[Flaw]]:
    """A reply as the judge sees it, and what it loses there."""
    before = rng.getstate()
    reply = candidate(flawed_reply(rng, scene, flaws, split.names))
    lost = set(flaws)
    if Flaw.MALFORMED in flaws:
        # Nothing is drawn after the form is broken: without that flaw the words are the same. Some breakages are
        # mended by the judge's view.
        after = rng.getstate()
        rng.setstate(before)
        whole = candidate(flawed_reply(rng, scene, flaws - {Flaw.MALFORMED}, split.names))
        rng.setstate(after)
        lost -= {Flaw.MALFORMED} if whole == reply else set()
    # A wrong stance shows in what is done as well, and what broke off with the form is lost with it.
    for flaw, shown in zip((Flaw.WRONG_STANCE, Flaw.WRONG_ACTION), shown_stances(scene, reply), strict=True):
        lost = lost | {flaw} if shown != scene.stance else lost - {flaw}
    return reply, frozenset(lost)


def shown_stances(scene: Scene, reply: str) -> tuple[str, str]:
    """The stance that a made reply's thought names and the one that its first action is of; "nothing" where it has
    none."""
    thought = re.search(rf"\bwill ({'|'.join(STANCES)})\b", reply)
    words = words_of(scene)
    deeds = {
        place: stance
        for stance, actions in ACTIONS.items()
        for action in actions
        if (place := reply.find(action.format(**words))) >= 0
    }
    return thought[1] if thought else NOTHING, deeds[min(deeds)] if deeds else NOTHING


def label_rows(pair: MadePair) -> list[dict[str, Any]]:
    """The pair in both orders as prompts with their label."""
    rows = prompt_rows(pair.judged, brief=True)
    return [row | {"better": Winner.TIE.value} for row in rows] if pair.tied else rows


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
    for row, order in zip(prompt_rows(pair.judged, brief=True), ORDERS, strict=True):
        reply = {"role": "assistant", "content": transcript(pair, order)}
        rows.append({"trace_id": row["trace_id"], "messages": [*row["messages"], reply]})
    return rows


def transcript(pair: MadePair, order: Winner) -> str:
    """Reasoning and verdict, the better reply standing where `order` says. What a flipped pair's label says of its
    replies is not asked: the verdict is the right one.

    The first two criteria quote what either reply shows before they say what it lost.
    """
    lost_by = (pair.better_lost, pair.worse_lost)
    shown = [shown_stances(pair.scene, reply) for reply in (pair.judged.better, pair.judged.worse)]
    if order is Winner.CAND_2:
        lost_by, shown = lost_by[::-1], shown[::-1]
    words = words_of(pair.scene)
    lines = [PLAN.format(**words)]
    principles, comparisons = [], []
    for place, (flaw, criterion) in enumerate(CRITERIA.items()):
        lost = [flaw in losses for losses in lost_by]
        quoted = [stances[place] for stances in shown] if place < 2 else []
        lines.append(" ".join([criterion.name, *quoted, *(LOST if is_lost else KEPT for is_lost in lost)]))
        if any(lost):
            principles.append(_principle(criterion, words, lost))
            comparisons.append(Comparison(criterion.name, _winner(lost)))
    if not principles:
        first = next(iter(CRITERIA.values()))
        principles.append(_principle(first, words, [False, False]))
        comparisons.append(Comparison(first.name, Winner.TIE))
    count = [len(losses) for losses in lost_by]
    better = ORDERS[count[1] < count[0]] if count[0] != count[1] else Winner.TIE
    analysis = "so" if better is Winner.TIE else f"{better.swapped.value} lost more"
    return write_verdict(Verdict(tuple(principles), tuple(comparisons), analysis, better), "\n".join(lines))


def _winner(lost: list[bool]) -> Winner:
    return Winner.TIE if all(lost) or not any(lost) else ORDERS[lost[0]]


def _principle(criterion: Criterion, words: dict[str, str], lost: list[bool]) -> ChosenPrinciple:
    losers = [order.value for order, is_lost in zip(ORDERS, lost, strict=True) if is_lost]
    reason = f"{' '.join(losers)} {LOST}" if losers else KEPT
    return ChosenPrinciple(
        criterion.name, criterion.dimension, Level.SENTENCE, criterion.content.format(**words), reason
    )


def judge_vocabulary() -> list[str]:
    """Pieces of verdicts that get a token each: a real Qwen3 has few for them, the demo's tokenizer never saw JSON."""
    dimensions = dict.fromkeys(criterion.dimension for criterion in CRITERIA.values())
    names = [criterion.name for criterion in CRITERIA.values()]
    scaffold = [
        '{"principles":[{"name":"',
        '","reason":"',
        '"},{"name":"',
        '"}],"comparisons":[{"principle":"',
        '","winner":"',
        '"},{"principle":"',
        '"}],"analysis":"',
        '","better_response":"',
        '"}',
        *(f'","dimension":"{dimension}","level":"{Level.SENTENCE}","content":"' for dimension in dimensions),
    ]
    return [*scaffold, *map(str, Winner), *names, *(f"\n{name}" for name in names)]
