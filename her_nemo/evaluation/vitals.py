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
from her_nemo.roleplay.measures import distinct, leaks, pattern_of, repetition, self_bleu, words
from her_nemo.roleplay.turn import Kind, parse_turn


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def vitals(
    replies: Sequence[str],
    *,
    names: Sequence[str | None] | None = None,
    secrets: Sequence[Sequence[str]] | None = None,
    expect_plan: bool = True,
) -> Vitals:
    """Vitals of `replies`, as generated and without the end-of-turn token.

    Args:
        names: the character who should speak in each reply, where known; another name is then a defect.
        secrets: words that must not show in each reply, where known.
        expect_plan: False for models that are not asked to plan.

    Raises:
        ValueError: no replies, or lists of other lengths.
    """
    count = len(replies)
    if not count:
        raise ValueError("vitals of no replies")
    turns = [
        parse_turn(text, expect_plan=expect_plan, expect_name=name)
        for text, name in zip(replies, names or [None] * count, strict=True)
    ]
    leaking = sum(leaks(turn, hidden) for turn, hidden in zip(turns, secrets or [()] * count, strict=True))
    texts = [words(" ".join(turn.text_of(kind) for kind in Kind)) for turn in turns]
    patterns = Counter(pattern_of(turn) for turn in turns)
    top_pattern, top_count = patterns.most_common(1)[0]
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
        mean_words={
            kind.value: sum(len(words(turn.text_of(kind))) for turn in turns) / count for kind in Kind
        },
        defects=dict(Counter(defect.value for turn in turns for defect in turn.defects).most_common()),
        top_pattern=top_pattern,
    )
