"""Role-play vitals: what can be said of replies without a judge.

They tell a healthy model from one that breaks its format, shows its thoughts, or has collapsed onto one
pattern. They do not say whether a reply is good. The measures themselves are in roleplay/measures.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from her_nemo.data.patterns import entropy_bits
from her_nemo.roleplay.measures import (
    distinct,
    leaks,
    pattern_of,
    repetition,
    self_bleu,
    speaks_for,
    words,
)
from her_nemo.roleplay.turn import Defect, Kind, Turn, parse_turn


@dataclass(frozen=True)
class Vitals:
    """Figures over a set of replies.

    Attributes:
        replies: how many there are.
        format_valid: share that parse without any defect.
        leak_rate: share for which `measures.leaks` holds.
        pattern_entropy: bits of Shannon entropy of the distribution of patterns over replies; a pattern is
            the order of segment kinds, and a malformed reply's pattern is kept apart from valid ones. Lies in
            [0, log2(replies)]; 0 means that all replies are built alike.
        top1_pattern_share: share of the most frequent pattern.
        self_bleu: see `measures.self_bleu`.
        distinct_1, distinct_2: see `measures.distinct`.
        repetition: mean over replies of the share of 4-grams that stood in the same reply before.
        mean_words: words per reply and kind, absent kinds counted as 0.
        defects: number of replies with each defect.
        top_pattern: the most frequent pattern, written "system_thinking role_action speech".
        kind_share: share of replies that have at least one segment of each kind that is not blank.
        word_share: share of all words that stand in segments of each kind; all 0 where there are no words.
        name_slips: share of replies whose name is missing or another's.
        speaks_for_others: share for which `measures.speaks_for` holds; None where nobody else is known.
    """

    replies: int
    format_valid: float
    leak_rate: float
    pattern_entropy: float
    top1_pattern_share: float
    self_bleu: float
    distinct_1: float
    distinct_2: float
    repetition: float
    mean_words: dict[str, float]
    defects: dict[str, int]
    top_pattern: str
    kind_share: dict[str, float]
    word_share: dict[str, float]
    name_slips: float
    speaks_for_others: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def vitals(
    replies: Sequence[str],
    *,
    names: Sequence[str | None] | None = None,
    secrets: Sequence[Sequence[str]] | None = None,
    others: Sequence[Sequence[str]] | None = None,
    expect_plan: bool = True,
) -> Vitals:
    """Vitals of `replies` in HER's tags, as generated and without the end-of-turn token.

    Args:
        names: the character who should speak in each reply, where known; another name is then a defect.
        secrets: words that must not show in each reply, where known.
        others: who else takes part beside each reply's character, where known.
        expect_plan: False for models that are not asked to plan.

    Raises:
        ValueError: no replies, or lists of other lengths.
    """
    turns = [
        parse_turn(text, expect_plan=expect_plan, expect_name=name)
        for text, name in zip(replies, names or [None] * len(replies), strict=True)
    ]
    return vitals_of_turns(turns, secrets=secrets, others=others)


def vitals_of_turns(
    turns: Sequence[Turn],
    *,
    secrets: Sequence[Sequence[str]] | None = None,
    others: Sequence[Sequence[str]] | None = None,
) -> Vitals:
    """Vitals of turns of any dialect, parsed as the model was asked to write them. Arguments as of `vitals`.

    Raises:
        ValueError: no turns, or lists of other lengths.
    """
    count = len(turns)
    if not count:
        raise ValueError("vitals of no replies")
    leaking = sum(leaks(turn, hidden) for turn, hidden in zip(turns, secrets or [()] * count, strict=True))
    texts = [words(" ".join(turn.text_of(kind) for kind in Kind)) for turn in turns]
    patterns = Counter(pattern_of(turn) for turn in turns)
    top_pattern, top_count = patterns.most_common(1)[0]
    by_kind = {kind.value: [len(words(turn.text_of(kind))) for turn in turns] for kind in Kind}
    all_words = sum(sum(lengths) for lengths in by_kind.values())
    return Vitals(
        replies=count,
        format_valid=sum(turn.well_formed for turn in turns) / count,
        leak_rate=leaking / count,
        pattern_entropy=entropy_bits(patterns),
        top1_pattern_share=top_count / count,
        self_bleu=self_bleu(texts),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        repetition=sum(repetition(text) for text in texts) / count,
        mean_words={kind: sum(lengths) / count for kind, lengths in by_kind.items()},
        defects=dict(Counter(defect.value for turn in turns for defect in turn.defects).most_common()),
        top_pattern=top_pattern,
        kind_share={kind.value: sum(kind in turn.pattern for turn in turns) / count for kind in Kind},
        word_share={
            kind: sum(lengths) / all_words if all_words else 0.0 for kind, lengths in by_kind.items()
        },
        name_slips=sum(_slips(turn) for turn in turns) / count,
        speaks_for_others=_share_for_others(turns, others),
    )


def _slips(turn: Turn) -> bool:
    return Defect.WRONG_NAME in turn.defects or Defect.MISSING_NAME in turn.defects


def _share_for_others(turns: Sequence[Turn], others: Sequence[Sequence[str]] | None) -> float | None:
    """Over the turns whose company is known."""
    if others is None:
        return None
    known = [(turn, names) for turn, names in zip(turns, others, strict=True) if names]
    if not known:
        return None
    return sum(speaks_for(turn, names) for turn, names in known) / len(known)
